"""``agentmem eval``: fidelity and recall of policies."""
