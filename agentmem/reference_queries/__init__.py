"""Obtain reference queries from a probe, from stored samples, and for the tokens that a pattern matches."""
