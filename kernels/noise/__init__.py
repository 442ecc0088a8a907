from .reference import Noise

__all__ = ["Noise"]
