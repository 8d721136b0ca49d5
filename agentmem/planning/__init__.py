"""From a cap in bytes to slots: what a capacity costs, and the largest one that fits. No tensors."""
