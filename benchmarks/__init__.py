"""Measurements of metafast, their notes and their results. Nothing here is installed; it runs from the repository's
root."""
