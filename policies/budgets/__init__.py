"""Head budgets: how many slots each head of each layer keeps."""
