"""Keys and values under the cap: sequences, their stores, the ledger of bytes. It knows neither policies nor models."""
