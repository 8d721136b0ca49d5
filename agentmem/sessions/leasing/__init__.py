"""One cap shared by many sessions: who may use how many bytes, who is swapped out, who waits."""
