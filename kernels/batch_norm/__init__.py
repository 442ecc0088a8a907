from .reference import MODES, BatchNorm

__all__ = ["MODES", "BatchNorm"]
