"""Holds the rules by which an inner step follows from the gradient: those of torch.optim, one a file."""

from metafast.inner.rules.adagrad import Adagrad
from metafast.inner.rules.adam import Adam, AdamW
from metafast.inner.rules.rmsprop import RMSprop
from metafast.inner.rules.sgd import SGD
from metafast.program.rule import Rule

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop", "Rule"]
