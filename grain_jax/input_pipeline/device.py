"""The batches of this process -> global `jax.Array`s on the devices, made ahead of time in a thread.

Beside preparation.py the only file of the input pipeline that needs JAX.
"""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Iterator

import jax

from grain_jax.core.schema import Batch

# Batches ahead: with 2 the demo's steps wait for 2% of their time, with 4 for 0.1%; reading comes in bursts.
DEPTH = 4
CLOSE_SECONDS = 5.0  # for the read under way


class Prefetch:
    """An iterator over `batches` as global arrays, up to `depth` of them ready on the devices.

    Args:
      batches: of this process, numpy.
      sharding: of the leading axis.
      depth: batches ahead; each holds device memory.
    """

    def __init__(self, batches: Iterator[Batch], sharding: jax.sharding.Sharding, depth: int = DEPTH):
        self.wait_seconds = 0.0  # sum of the waits of the consumer for a batch
        self._batches, self._sharding = batches, sharding
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises what the source raised, and StopIteration after its end."""
        if self._closed.is_set():
            raise StopIteration
        start = time.monotonic()
        item = self._queue.get()
        self.wait_seconds += time.monotonic() - start
        if isinstance(item, Batch):
            return item
        self.close()
        raise item

    def close(self) -> None:
        """Stops the thread and drops its batches; leaves a thread that hangs for CLOSE_SECONDS."""
        self._closed.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while True:
            with contextlib.suppress(queue.Empty):
                while True:  # the thread may wait for room in the queue
                    self._queue.get_nowait()
            if not self._thread.is_alive() or time.monotonic() >= deadline:
                return
            self._thread.join(timeout=0.05)

    def _fill(self) -> None:
        last: BaseException = StopIteration()
        try:
            for batch in self._batches:
                if self._closed.is_set():
                    return
                self._queue.put(shard_batch(batch, self._sharding))
        except BaseException as error:  # of any kind: the consumer raises it
            last = error
        finally:
            if close := getattr(self._batches, "close", None):
                close()  # a generator holds the threads of tf.data
        self._queue.put(last)


def shard_batch(batch: Batch, sharding: jax.sharding.Sharding) -> Batch:
    """The global Batch of which this process holds these rows.

    Args:
      batch: numpy; the leading axis of every field has the rows that the devices of this process hold, in the
        order of the global batch (`sharding.lanes_of_process`).
      sharding: of the leading axis, e.g. NamedSharding(mesh, P(("data", "fsdp"))).
    """
    to_global = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(to_global, batch)  # a field of None stays
