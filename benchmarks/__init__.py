"""Measurements that the documentation cites. Each prints its table and appends rows to a JSON file."""
