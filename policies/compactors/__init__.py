"""Compactors that policies use: Attention Matching, eviction, and the slot selectors of Attention Matching."""
