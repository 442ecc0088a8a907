from .reference import Derived

__all__ = ["Derived"]
