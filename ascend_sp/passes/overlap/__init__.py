"""Hiding collectives behind compute: a list scheduler, estimates, and the choice of strategy."""
