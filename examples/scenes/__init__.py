"""The demo's own weights: scenes that a program draws, and a small FLUX trained on them."""
