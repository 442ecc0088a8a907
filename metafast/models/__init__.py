"""The networks of the few-shot papers, as ``nn.Sequential`` modules whose last layer is called ``head``."""

from metafast.models.conv4 import conv4
from metafast.models.mlp import mlp

__all__ = ["conv4", "mlp"]
