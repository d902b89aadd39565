"""`python -m grain_jax.train` is `grain-jax train`."""

from grain_jax.train import run

if __name__ == "__main__":
    run.console()
