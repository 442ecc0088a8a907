from .reference import Dropout, dropped

__all__ = ["Dropout", "dropped"]
