"""Steps of inner loops, from a gradient to the next parameters, and the way back through them."""
