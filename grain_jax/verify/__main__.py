"""The command `grain-jax verify`."""

from grain_jax.cli import process
from grain_jax.verify import command

if __name__ == "__main__":
    process.run(command.main)
