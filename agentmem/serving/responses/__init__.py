"""The routes under ``/v1/responses``: replies that can be stored and continued, and compaction items."""
