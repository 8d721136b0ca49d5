"""``agentmem chat``: a conversation in the terminal."""
