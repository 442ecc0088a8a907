from .reference import Linear

__all__ = ["Linear"]
