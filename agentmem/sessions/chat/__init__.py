"""Conversion between conversations and token ids: messages, chat templates, control tokens and decoding of text."""
