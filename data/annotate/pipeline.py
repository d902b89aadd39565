"""The passes on Apache Beam. One element is one shard of the source: a few hundred images, or a tar of them.

There is no GroupByKey, before which batch runners finish all work: a killed job would have no results.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options import pipeline_options
from apache_beam.runners.portability import fn_api_runner
from apache_beam.utils import shared

from grain_jax.core import errors
from grain_jax.data import job, sources
from grain_jax.data.annotate import passes
from grain_jax.data.annotate.arguments import Annotate

_MARK = "#user-error#"
_LOCAL = ("directrunner", "direct", "switchingdirectrunner", "fnapirunner")


class AnnotateShards(beam.DoFn):
    """Annotates shards with models that are loaded once per worker process, however many threads it has."""

    def __init__(self, args: Annotate):
        self._args, self._shared = args, shared.Shared()

    def setup(self):
        with _marking_user_errors():
            self._passes = self._shared.acquire(lambda: passes.Passes(self._args))

    def process(self, shard: tuple):
        shard = sources.SourceShard(*shard)
        # A runner gives a bundle again if one of its shards failed: the others are done.
        output, marks = self._passes.output, passes.marks(self._args)
        if not all(output.path(mark, f"{shard.name}.done").exists() for mark in marks):
            with _marking_user_errors():
                self._passes.annotate(shard)

    def teardown(self):
        self._passes.close()


def run(args: Annotate, shards: Sequence[sources.SourceShard]) -> None:
    """Runs the passes over the shards. Raises UserError: a worker met wrong usage or wrong input."""
    options = pipeline_options.PipelineOptions(args.beam)
    # Beam logs the traceback of every error; user errors are printed as one line.
    logging.getLogger(beam.runners.common.__name__).addFilter(lambda record: _MARK not in record.getMessage())
    name = options.view_as(pipeline_options.StandardOptions).runner or _LOCAL[0]
    # Beam's DirectRunner would first fetch another runner (Prism) from the internet.
    runner = fn_api_runner.FnApiRunner() if name.lower() in _LOCAL else name
    pipeline = beam.Pipeline(runner=runner, options=options)
    # As plain tuples: Beam would make a table's row of a NamedTuple.
    created = pipeline | "Shards" >> beam.Create([tuple(shard) for shard in shards])
    created | "Annotate" >> beam.ParDo(AnnotateShards(args))
    output = job.Output(args.output)
    names, done = {shard.name for shard in shards}, lambda: output.done(*passes.marks(args))
    with job.watched("shards", len(names), lambda: len(done() & names)):
        try:
            pipeline.run().wait_until_finish()
        except Exception as error:
            marked = re.search(f"{_MARK}(.)(.*?){_MARK}", str(error), re.DOTALL)
            if marked:
                kinds = {str(kind.status): kind for kind in (errors.UserError, errors.StorageFault)}
                raise kinds[marked.group(1)](marked.group(2)) from None
            raise


@contextlib.contextmanager
def _marking_user_errors() -> Iterator[None]:
    """Marks the text of user errors, which runners put into longer texts."""
    try:
        yield
    except Exception as error:
        line = error if isinstance(error, errors.UserError) else errors.of_system(error)
        if line is None:
            raise
        raise RuntimeError(f"{_MARK}{line.status}{line}{_MARK}") from error
