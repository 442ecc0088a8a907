from .reference import MSE

__all__ = ["MSE"]
