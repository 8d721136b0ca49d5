"""The steps of one compaction of one sequence: request, budgets, reference queries, fit, checks and commit."""
