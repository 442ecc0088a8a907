"""Holds the Program, the form in which an executor sees a model, and makes one of a user's module."""

from metafast.program.program import Node, Parameter, Program

__all__ = ["Node", "Parameter", "Program"]
