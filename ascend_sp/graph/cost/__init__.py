"""A static cost model: what ops and collectives take on a device, from their shapes alone."""
