"""The command line: each command is one file, which ``app`` finds."""
