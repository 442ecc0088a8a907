"""Few-shot tasks that live on the device: data sets, and samplers that are functions of a counter."""

from metafast.episodes.dataset import ImageDataset, Splits
from metafast.episodes.folder import load_folder
from metafast.episodes.glyphs import load_glyphs
from metafast.episodes.omniglot import load_omniglot
from metafast.episodes.sampler import ClassificationSampler
from metafast.episodes.sinusoid import Sinusoids, SinusoidSampler

__all__ = [
    "ClassificationSampler",
    "ImageDataset",
    "SinusoidSampler",
    "Sinusoids",
    "Splits",
    "load_folder",
    "load_glyphs",
    "load_omniglot",
]
