from .reference import AdaptiveAvgPool2d

__all__ = ["AdaptiveAvgPool2d"]
