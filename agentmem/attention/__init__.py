"""Attention over ragged runs of slots with β: one definition, one path per backend."""
