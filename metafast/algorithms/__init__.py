"""The learners."""

from metafast.algorithms.learner import Adapted, Learner, LearnerOutput
from metafast.algorithms.maml import (
    ANIL,
    FOMAML,
    MAML,
    MAMLPlusPlus,
    MetaSGD,
    multi_step_weights,
    without_batch_norm,
)
from metafast.algorithms.reptile import Reptile

__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "Adapted",
    "Learner",
    "LearnerOutput",
    "MAMLPlusPlus",
    "MetaSGD",
    "Reptile",
    "multi_step_weights",
    "without_batch_norm",
]
