"""A server with OpenAI's HTTP interface, which keeps the memories of its conversations under one cap.

These words are used throughout the package:

- A turn is one request to the model: it reads new messages, may compact the memory, and may write a reply.
- A compaction item stands for a compacted conversation: a memory saved on disk, and a token that names this memory.
- A recipe holds the arguments with which a conversation's session is opened: policy, settings, tools, template options.
- A save is one state of a conversation in the state folder; it is written once, and never changes.
- A replica is one of several servers that share a state folder behind a front.
- The owner of a request is identified by the request's API key.
"""
