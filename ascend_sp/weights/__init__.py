"""Weights of which each rank holds a part, gathered where a program needs them."""
