"""Passes that choose Ascend's fused ops."""
