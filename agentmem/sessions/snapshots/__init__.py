"""Sessions on disk: what a snapshot holds, how it is written as a whole, and how it is verified before use."""
