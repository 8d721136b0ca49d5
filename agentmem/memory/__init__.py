"""The memory that holds keys and values under the cap: sequences, stores and the ledger of bytes. No model code."""
