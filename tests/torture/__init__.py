"""The torture test: nothing lost, nothing stale, nothing half-written; see `__main__`."""
