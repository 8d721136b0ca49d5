"""The dashboard page at ``/``, which shows the cap, the queue, and how memories grow and are compacted."""
