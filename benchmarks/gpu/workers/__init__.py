"""Programs that the steps start, each ``python -m`` in a process of its own, with torch and metafast."""
