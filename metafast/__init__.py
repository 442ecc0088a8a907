"""metafast: exact second-order meta-gradients for a whole batch of tasks."""

from metafast.inner.rates import Rate
from metafast.learners import (
    ANIL,
    FOMAML,
    MAML,
    Adapted,
    Learner,
    LearnerOutput,
    MAMLPlusPlus,
    MetaSGD,
    Reptile,
    multi_step_weights,
    without_batch_norm,
)
from metafast.program.capture import CaptureError
from metafast.tasks import TaskBatch
from metafast.verification.certificate import Certificate, verify

__version__ = "0.1.0"

__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "Adapted",
    "CaptureError",
    "Certificate",
    "Learner",
    "LearnerOutput",
    "MAMLPlusPlus",
    "MetaSGD",
    "Rate",
    "Reptile",
    "TaskBatch",
    "multi_step_weights",
    "verify",
    "without_batch_norm",
]
