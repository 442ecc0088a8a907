from .reference import CrossEntropy

__all__ = ["CrossEntropy"]
