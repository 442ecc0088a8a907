from .reference import InputPart

__all__ = ["InputPart"]
