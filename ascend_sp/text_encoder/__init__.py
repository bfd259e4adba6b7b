"""Tensor parallelism for text encoders: find what can be split, split it, prove it, load it."""
