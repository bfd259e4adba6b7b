"""Sequence sharding: layouts, rules, seeds, propagation, materialisation."""
