"""The inner loop as autograd and the rates of its steps see it."""
