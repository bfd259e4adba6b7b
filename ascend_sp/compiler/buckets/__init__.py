"""Programs that are run for capacities, where requests have lengths (docs/serving.md)."""
