"""The key-value cache's tensors."""
