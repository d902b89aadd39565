"""The command `python -m grain_jax.verify`."""

from grain_jax.runtime import command_line
from grain_jax.verify import command

if __name__ == "__main__":
    command_line.main(command.main)
