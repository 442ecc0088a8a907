from .reference import GELU, LeakyReLU, ReLU, Sigmoid, Tanh

__all__ = ["GELU", "LeakyReLU", "ReLU", "Sigmoid", "Tanh"]
