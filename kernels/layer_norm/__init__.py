from .reference import LayerNorm

__all__ = ["LayerNorm"]
