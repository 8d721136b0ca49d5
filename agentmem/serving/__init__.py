"""A server that speaks OpenAI's HTTP interface; conversations and compaction items are latent memory under one cap."""
