"""`python -m grain_jax` is `grain-jax`."""

from grain_jax.cli import commands

if __name__ == "__main__":
    commands.main()
