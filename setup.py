"""The packages of the wheel; `configs`, `data` and `launch` lie beside grain_jax, where links lead to them."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["grain_jax*"]))
