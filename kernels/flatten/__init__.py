from .reference import Flatten

__all__ = ["Flatten"]
