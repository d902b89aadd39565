"""Makes a package of this folder, named `data`, for Beam's workers elsewhere: `--setup_file data/setup.py`.

Workers also need grain_jax's wheel, and what models that run on them need (docs/annotate.md).
"""

import sys

# Run as a script, this folder would come first, and its `inspect` before Python's own.
sys.path[:] = [path for path in sys.path if path and path != sys.path[0]]

from setuptools import find_packages, setup  # noqa: E402

setup(
    name="grain_jax_data",
    version="0.1.0",
    description="The offline tools of grain_jax, as Beam's workers import them",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"data": "."},
    packages=["data", *(f"data.{name}" for name in find_packages("."))],
    package_data={"data.annotate": ["prompts/*.txt"], "data.inspect": ["page.*"]},
    install_requires=["grain_jax"],
)
