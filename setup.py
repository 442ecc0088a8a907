"""Package layout; everything that is not code lives in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

packages = [*find_packages(include=["metafast", "metafast.*"]), "metafast.kernels"]
packages += [f"metafast.kernels.{p}" for p in find_packages("kernels")]

setup(packages=packages, package_dir={"metafast.kernels": "kernels"})
