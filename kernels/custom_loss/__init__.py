from .reference import CustomLoss

__all__ = ["CustomLoss"]
