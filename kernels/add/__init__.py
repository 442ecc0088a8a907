from .reference import Add

__all__ = ["Add"]
