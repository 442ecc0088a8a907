"""Holds the learners, one file each. A class with a ``name`` that is imported here can be trained by that name."""

from metafast.learners.adapted import Adapted
from metafast.learners.adapted_parameters import without_batch_norm
from metafast.learners.anil import ANIL
from metafast.learners.base import Learner, LearnerOutput
from metafast.learners.base import by_name as by_name
from metafast.learners.base import names as names
from metafast.learners.bilevel import Bilevel, BilevelOutput, Solution
from metafast.learners.fast_weights import Fast, FastWeights
from metafast.learners.fomaml import FOMAML
from metafast.learners.gradient import GradientLearner
from metafast.learners.maml import MAML
from metafast.learners.maml_plus_plus import MAMLPlusPlus, multi_step_weights
from metafast.learners.meta_sgd import MetaSGD
from metafast.learners.reptile import Reptile
from metafast.learners.task_loss import TaskLoss

# What the package itself offers; the look-up by name is for recipes and the command line.
__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "Adapted",
    "Bilevel",
    "BilevelOutput",
    "Fast",
    "FastWeights",
    "GradientLearner",
    "Learner",
    "LearnerOutput",
    "MAMLPlusPlus",
    "MetaSGD",
    "Reptile",
    "Solution",
    "TaskLoss",
    "multi_step_weights",
    "without_batch_norm",
]
