"""The packages of the wheel: `configs`, `data` and `launch` lie beside grain_jax; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

FOUND = find_packages(include=["grain_jax*", "configs*", "data*", "launch*"])

setup(packages=[x if x.startswith("grain_jax") else f"grain_jax.{x}" for x in FOUND])
