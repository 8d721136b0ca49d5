"""One compaction of one sequence: request, budgets, reference queries, fit, checks, commit."""
