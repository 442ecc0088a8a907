"""Puts the inner loop into autograd, and holds the learning rates of its steps."""
