"""`python -m grain_jax.report` is `grain-jax report`."""

import sys

from grain_jax.evaluate.report.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
