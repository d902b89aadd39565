"""The passes on Apache Beam. One element is one shard of the source: a few hundred images, or a tar of them.

A worker writes each shard as soon as it is done, and a restarted job skips it. A GroupByKey would lose this: batch
runners finish all work before one, so a killed job would have no results.
"""

import contextlib
import errno
import logging
import re
import threading
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options import pipeline_options
from apache_beam.runners.portability import fn_api_runner
from apache_beam.utils import shared

from grain_jax.core import errors, progress
from grain_jax.data import sources
from grain_jax.data.annotate import passes

SECONDS_BETWEEN_LOOKS = 10.0  # at the output folder, for the progress line: a list of all shards
_MARK = "#user-error#"
_OF_DISK = [
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM")
]
_LOCAL = ("directrunner", "direct", "switchingdirectrunner", "fnapirunner")


class PipelineError(errors.UserError):
    """The pipeline ended before its work was done; the message is the cause."""


class AnnotateShards(beam.DoFn):
    """Annotates shards with models that are loaded once per worker process, however many threads it has."""

    def __init__(self, job: passes.Job):
        self._job, self._shared = job, shared.Shared()

    def setup(self):
        with _told():
            self._passes = self._shared.acquire(lambda: passes.Passes(self._job))

    def process(self, shard: tuple):
        shard = sources.SourceShard(*shard)
        # A runner gives a bundle again when one of its shards failed: the others are done.
        given = self._job.given
        if given.retry_failed or not self._job.output.is_finished(shard.name, given.passes):
            with _told():
                self._passes.annotate(shard)


def run(job: passes.Job, shards: Sequence[sources.SourceShard]) -> None:
    """Runs the job's passes over the shards that are to be done.

    Raises:
      PipelineError: a worker met wrong usage or wrong input.
    """
    options = pipeline_options.PipelineOptions(job.given.beam)
    # Beam logs the traceback of every error; user errors are printed as one line.
    logging.getLogger(beam.runners.common.__name__).addFilter(
        lambda record: _MARK not in record.getMessage()
    )
    # Beam's DirectRunner would first fetch another runner (Prism) from the internet.
    runner = fn_api_runner.FnApiRunner() if _is_local(options) else None  # None: as options say
    pipeline = beam.Pipeline(runner=runner, options=options)
    # As plain tuples: Beam would make a table's row of a NamedTuple.
    created = pipeline | "Shards" >> beam.Create([tuple(shard) for shard in shards])
    created | "Annotate" >> beam.ParDo(AnnotateShards(job))
    with _shown(job, {shard.name for shard in shards}):
        try:
            pipeline.run().wait_until_finish()
        except Exception as error:
            told = re.search(f"{_MARK}(.*?){_MARK}", str(error), re.DOTALL)
            if told:
                raise PipelineError(told.group(1)) from None
            raise


def check(beam_arguments: Sequence[str]) -> None:
    """Raises PipelineError for an option that Beam does not have."""
    options = pipeline_options.PipelineOptions(list(beam_arguments))
    known = pipeline_options.PipelineOptions([]).get_all_options()
    given = options.get_all_options(retain_unknown_options=True)
    unknown = sorted(given.keys() - known.keys())
    positional = [x for x in beam_arguments[:1] if not x.startswith("--")]
    # What a job server elsewhere takes is known only there.
    if positional or (unknown and _is_local(options)):
        got = positional[0] if positional else f"--{unknown[0]}"
        raise PipelineError(
            f"got {got}, expected an argument of this command (--help) or of Beam's"
        )


def _is_local(options: pipeline_options.PipelineOptions) -> bool:
    runner = options.view_as(pipeline_options.StandardOptions).runner
    return not runner or runner.lower() in _LOCAL


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Marks user errors, so that their text is found in the longer text that a runner raises."""
    try:
        yield
    except (errors.UserError, OSError) as error:
        told = str(error)
        if isinstance(error, OSError):
            if error.errno not in _OF_DISK:
                raise
            told = f"{error.filename}: {error.strerror}; fix it, then give the same command again"
        raise RuntimeError(f"{_MARK}{told}{_MARK}") from error


@contextlib.contextmanager
def _shown(job: passes.Job, names: set[str]) -> Iterator[None]:
    """Reports progress by the files of the output folder, which work with every runner."""
    ended, counter = threading.Event(), progress.Counter("shards", len(names))
    before = job.output.finished(job.given.passes)  # a job that retries

    def show():
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            done = job.output.finished(job.given.passes) & names - before
            if new := len(done) - int(counter.done):
                counter.add(new)
        counter.close()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
