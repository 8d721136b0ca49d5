"""``agentmem eval``: measure the fidelity and the recall of policies."""
