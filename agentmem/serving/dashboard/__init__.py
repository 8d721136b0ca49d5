"""The page at ``/``: the cap, the queue, and the memories of conversations as they are compacted."""
