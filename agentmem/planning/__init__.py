"""Plan a memory: compute the bytes that a capacity in slots needs, and the largest capacity under a cap. No tensors."""
