from .reference import MaxPool2d

__all__ = ["MaxPool2d"]
