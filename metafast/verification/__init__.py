"""Holds results to the truth: certificates, the agreement of gradients, ``doctor`` and the demonstration."""
