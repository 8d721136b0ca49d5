"""Conversations as token ids: chat templates, what continues a rendering, control tokens, decoded text."""
