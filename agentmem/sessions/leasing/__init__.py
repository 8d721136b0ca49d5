"""Sharing of one cap among many sessions: leases, preemption of idle memories and their storage on disk."""
