"""The steps of the plans. They start processes and read what these leave, with the standard library alone."""
