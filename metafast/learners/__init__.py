"""The learners, one file each."""

from metafast.learners.anil import ANIL
from metafast.learners.fomaml import FOMAML
from metafast.learners.gradient import Adapted, Learner, LearnerOutput
from metafast.learners.maml import MAML
from metafast.learners.maml_plus_plus import MAMLPlusPlus, multi_step_weights, without_batch_norm
from metafast.learners.meta_sgd import MetaSGD
from metafast.learners.reptile import Reptile

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
