"""Where reference queries come from: a probe of the text, stored samples, and the tokens that a pattern names."""
