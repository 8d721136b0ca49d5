"""The route ``/v1/chat/completions``: its request, its answer and its stream."""
