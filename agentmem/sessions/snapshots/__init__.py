"""Snapshots of sessions on disk: their content and format, and how they are written, verified and loaded."""
