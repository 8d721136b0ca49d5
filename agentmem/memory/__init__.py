"""Keys and values under the cap: sequences, their stores, and the ledger of bytes. No model code."""
