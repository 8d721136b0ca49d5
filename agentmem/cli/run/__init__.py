"""``agentmem run``: generate under a cap and report what happened."""
