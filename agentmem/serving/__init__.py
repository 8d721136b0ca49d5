"""A server with OpenAI's HTTP interface that keeps conversations and compaction items as memories under one cap."""
