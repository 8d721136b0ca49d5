"""Compute attention over slots with β; KV heads of a layer may hold different numbers of slots."""
