"""How results are held to the truth."""
