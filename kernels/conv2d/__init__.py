from .reference import Conv2d

__all__ = ["Conv2d"]
