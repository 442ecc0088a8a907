"""metafast: exact second-order meta-gradients for a whole batch of tasks."""

from metafast import learners
from metafast.inner.rates import Rate
from metafast.inner.rules import SGD, Adagrad, Adam, AdamW, RMSprop, Rule
from metafast.learners import *  # noqa: F403  (what it offers is written down there, once)
from metafast.program.capture import CaptureError
from metafast.tasks import TaskBatch
from metafast.verification.certificate import Certificate, verify

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "CaptureError",
    "Certificate",
    "RMSprop",
    "Rate",
    "Rule",
    "TaskBatch",
    "verify",
]
__all__ += learners.__all__
