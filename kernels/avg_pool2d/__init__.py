from .reference import AvgPool2d

__all__ = ["AvgPool2d"]
