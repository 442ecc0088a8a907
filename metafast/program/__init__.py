"""Program: what a model is to an executor, and how one is made of a user's module."""

from metafast.program.program import Node, Parameter, Program

__all__ = ["Node", "Parameter", "Program"]
