"""Obtain reference queries from a probe or from stored samples, and find tokens that match a policy's pattern."""
