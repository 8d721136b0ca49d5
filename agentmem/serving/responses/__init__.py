"""``/v1/responses``: replies that can be stored and gone on from, and compaction items."""
