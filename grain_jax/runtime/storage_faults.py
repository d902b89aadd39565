"""One line for a full disk or a removed folder, whichever thread or library fails first."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

from etils import epath

from grain_jax import errors


@contextlib.contextmanager
def in_a_line(workdir: epath.PathLike) -> Iterator[None]:
    """Replaces errors inside that come from a full disk, or from a workdir that was removed or cannot be written.

    Raises:
      errors.StorageFault: in place of such an error.
    """
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        text = _line(epath.Path(workdir), error)
        if text is None:
            raise
        raise errors.StorageFault(text) from None


def _line(workdir: epath.Path, error: Exception) -> str | None:
    if errors.is_full_disk(error):
        return (
            f"{workdir}: no space left on the device; the checkpoints that are finished are whole:"
            " make room, and the same command goes on from the newest"
        )
    if "://" not in str(workdir) and not workdir.exists():
        return f"{workdir}: the folder was removed while the run was writing to it"
    for cause in errors.causes(error):
        if isinstance(cause, OSError) and str(cause.filename or "").startswith(str(workdir)):
            gone = isinstance(cause, FileNotFoundError)
            what = "removed while the run was writing to it" if gone else cause.strerror
            return f"{cause.filename}: {what}; the same command goes on from the newest checkpoint"
    fault = errors.of_system(error)
    return f"{fault}; the same command goes on from the newest checkpoint" if fault else None


def _follows(error: BaseException | None) -> bool:
    """Whether it follows from a failed save, whose event loop closes before all writes end."""
    refused = isinstance(errors.of_system(error), errors.StorageFault)
    return refused or str(error) == "Event loop is closed"


def quiet_threads() -> None:
    """Silences other threads about a disk that refuses to write, and the threads of Orbax about every error: the main thread reports.

    Otherwise each prints a traceback, by its hook and by the logs of absl and asyncio. The next wait for a save raises
    its error on the main thread.
    """
    of_thread, of_unraisable, of_c = threading.excepthook, sys.unraisablehook, sys.excepthook

    def in_thread(args):
        if not _follows(args.exc_value):
            of_thread(args)

    def unraisable(args):
        if not _follows(args.exc_value):
            of_unraisable(args)

    def in_c(
        kind, error, stack
    ):  # by TensorStore's threads; the main thread's faults do not come here
        if not _follows(error):
            of_c(kind, error, stack)

    threading.excepthook, sys.unraisablehook, sys.excepthook = in_thread, unraisable, in_c
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)
