"""Torch-free state machines: blocks, requests, batches, schedulers. They hold no tensors, no clock and no I/O."""
