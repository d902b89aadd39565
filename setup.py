"""The packages of the wheel; links lead to `configs`, `data` and `launch` beside grain_jax."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["grain_jax*"]))
