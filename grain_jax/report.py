"""`python -m grain_jax.report` is `grain-jax report`."""

from grain_jax.cli import process
from grain_jax.evaluate.report import page

if __name__ == "__main__":
    process.run(page.main)
