"""Attention over slots with β, in which the KV heads of a layer may hold different numbers of slots."""
