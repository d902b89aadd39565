"""The flags of `grain-jax aviary`."""

import os

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command
from grain_jax.data.aviary.settings import Settings


class Aviary(Command, name="aviary"):
    """Draws the embedded dataset: birds of invented species, with annotations.

    With --records DIR, A.jsonl is also built into TFRecords there, as grain-jax build does.

    Example:
      grain-jax aviary --output runs/aviary --records runs/aviary/records

    files:
      --output DIR   folder to write
      --records DIR  also build TFRecords in DIR/NAME/1.0.0
      --name NAME    of the record set
      --processes P  that draw (default: one a core)
    """

    output: str
    records: str | None = None
    name: str = "aviary"
    processes: int = flag(os.cpu_count() or 1, high=1024)
    settings: Settings = Settings()
