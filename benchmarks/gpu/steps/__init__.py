"""What the steps of the plans do: they start processes and read what these leave. Standard library only."""
