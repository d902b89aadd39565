"""The package pyarrow, or a line that says how to get it."""

from typing import Any

from grain_jax.data.sources import base


def pyarrow() -> Any:
    """The package pyarrow, with `fs` and `parquet`. Raises SourceError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.fs
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise base.SourceError(
            f"Parquet files need {error.name}, which is not installed; to get it: pip install 'grain_jax[embed]'"
        ) from None
    return pyarrow
