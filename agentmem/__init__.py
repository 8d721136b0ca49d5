"""Memory-capped long reasoning for Hugging Face models."""
