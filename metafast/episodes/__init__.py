"""Few-shot tasks that live on the device: data sets, and samplers that are functions of a counter."""

from metafast.episodes.dataset import ImageDataset, Splits
from metafast.episodes.sampler import ClassificationSampler, Sampler
from metafast.episodes.source import Source
from metafast.episodes.sources.folder import load_folder
from metafast.episodes.sources.glyphs import load_glyphs
from metafast.episodes.sources.omniglot import load_omniglot
from metafast.episodes.sources.sinusoid import Sinusoids, SinusoidSampler

__all__ = [
    "ClassificationSampler",
    "ImageDataset",
    "Sampler",
    "SinusoidSampler",
    "Sinusoids",
    "Source",
    "Splits",
    "load_folder",
    "load_glyphs",
    "load_omniglot",
]
