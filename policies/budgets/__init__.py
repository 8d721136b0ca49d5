"""Head budgets: classes that decide how many slots each KV head of each layer keeps."""
