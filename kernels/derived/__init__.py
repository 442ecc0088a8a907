from .reference import Derived, compute_task_by_task

__all__ = ["Derived", "compute_task_by_task"]
