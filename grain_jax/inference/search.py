"""Search by texts, images or vectors over a folder of embeddings that `grain-jax embed` wrote.

    index = search.Index("embeddings")
    for hit in search.search(index, "a long orange beak")[0]:
        print(hit.score, hit.path, hit.box_xyxy)

Exact: every vector is compared, in blocks, on all devices; memory holds two blocks whatever the size of the folder.
"""

import concurrent.futures
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import errors
from grain_jax.files import embeddings
from grain_jax.inference import predictor
from grain_jax.runtime import saved_model

BY = ("regions", "images")
BLOCK_BYTES = 64 << 20  # of float32; a block and the one after it are in memory
_ROWS = 1024  # read at a time
_FOOTERS = 16  # read at a time

# A text, or several; PIL images; or float [T, D] of unit length.
Queries: TypeAlias = str | Sequence[str] | Sequence[PIL.Image.Image] | np.ndarray


class SearchError(errors.UserError):
    """The index does not suit the model or the question; the message is one line."""


class Hit(NamedTuple):
    """An image that was found."""

    score: float  # cosine of the query and the best region, or the image
    id: str
    path: str
    width: int  # pixels; and height
    height: int
    region: int | None  # position of the best region in `boxes_xyxy`; None: the image was compared
    boxes_xyxy: np.ndarray  # float32 [R, 4] in [0, 1], of all its regions
    source: Mapping[str, Any]  # the piece of the source that has it, as `grain-jax embed` noted it

    @property
    def box_xyxy(self) -> np.ndarray | None:
        """The box of the best region, float32 [4] in [0, 1]; None: the image was compared."""
        return None if self.region is None else self.boxes_xyxy[self.region]


class Index:
    """A folder of embeddings. To open it reads the ends of its files alone.

    Args:
      folder: that `grain-jax embed` wrote, local or remote; it may be unfinished.

    Attributes:
      settings: what the embeddings are made of (settings.json).
      embed_dim: D.
      parts: of each file, what it says of itself.
      missing: number of files that are not there yet.

    Raises:
      embeddings.EmbeddingsError: it is no such folder, it has no file yet, or one is damaged.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder).expanduser()
        self.settings = embeddings.read_settings(self.folder)
        embeddings.pyarrow()
        data = self.folder / embeddings.DATA
        there = data.iterdir() if data.is_dir() else ()
        paths = sorted(path for path in there if path.suffix == ".parquet")
        with concurrent.futures.ThreadPoolExecutor(_FOOTERS) as pool:
            self.parts = list(pool.map(embeddings.read_part, paths))
        if not len(self):
            raise embeddings.EmbeddingsError(
                f"{data}: got no image there yet, expected Parquet files of grain-jax embed"
            )
        self.embed_dim: int = self.settings["embed_dim"]
        expected = embeddings.file_count(self.parts[0].name)
        self.missing = expected - len(self.parts)

    def __len__(self) -> int:
        """Number of images."""
        return sum(part.rows for part in self.parts)

    @property
    def has_regions(self) -> bool:
        """Whether it has regions of the images."""
        return bool(self.settings["regions"])

    @functools.cached_property
    def model(self) -> predictor.Predictor:
        """The model that made it, loaded from where it lay then. Raises as `grain_jax.load` and `check`."""
        found = predictor.load(self.settings["checkpoint"], self.settings["dtype"])
        self.check(found)
        return found

    def check(self, model: predictor.Predictor) -> None:
        """Raises SearchError unless the model is the one that made the index, by its digests."""
        if model.model.embed_dim != self.embed_dim:
            raise SearchError(
                f"{self.folder}: has embeddings of {self.embed_dim} numbers, got a model with"
                f" {model.model.embed_dim}; expected the model {self.settings['checkpoint']}"
            )
        got = saved_model.model_digests(model.model, jax.device_get(model.params))
        if got != self.settings["model"]:
            raise SearchError(
                f"{self.folder}: was made by another model: {self.settings['checkpoint']}, parameters"
                f" {self.settings['model']['params']}, got parameters {got['params']}"
            )

    def vectors(self, by: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All vectors in order, a thousand images at a time.

        Args:
          by: one of BY.

        Yields:
          values float32 or float16 [N, D]; the image of each, int64 [N], counted over all files; and its position among
          the regions of the image, int32 [N].

        Raises:
          embeddings.EmbeddingsError: a file is damaged.
        """
        name = embeddings.REGION_EMBED if by == "regions" else embeddings.IMAGE_EMBED
        first = 0
        for part in self.parts:
            for column in self._column(part, name):
                counts = np.ones(len(column), np.int64)
                if by == "regions":
                    counts = np.diff(column.offsets.to_numpy())
                    column = column.flatten()
                values = column.flatten().to_numpy(zero_copy_only=False)
                images = np.repeat(np.arange(first, first + len(counts)), counts)
                starts = np.repeat(np.cumsum(counts) - counts, counts)
                regions = (np.arange(len(images)) - starts).astype(np.int32)
                yield values.reshape(-1, self.embed_dim), images, regions
                first += len(counts)

    def _column(self, part: embeddings.Part, name: str) -> Iterator[Any]:
        path = self.folder / embeddings.DATA / part.name
        with embeddings.open_file(path) as file:
            batches = file.iter_batches(_ROWS, columns=[name])
            while True:
                try:
                    batch = next(batches, None)
                except OSError as error:
                    raise embeddings.damaged(path, error) from None
                if batch is None:
                    return
                yield batch.column(0)

    def rows(self, images: Sequence[int]) -> list[dict[str, Any]]:
        """The columns without embeddings of images, by their number over all files, and the `source` of each.

        Raises:
          embeddings.EmbeddingsError: a file is damaged.
        """
        starts = np.cumsum([0, *(part.rows for part in self.parts)])
        of_part = np.searchsorted(starts, np.asarray(images), side="right") - 1
        columns = ["id", "path", "width", "height", *([embeddings.BOXES] * self.has_regions)]
        found: list[dict[str, Any]] = [{}] * len(images)
        for number in np.unique(of_part).tolist():
            part, mine = self.parts[number], np.flatnonzero(of_part == number).tolist()
            path = self.folder / embeddings.DATA / part.name
            with embeddings.open_file(path) as file:
                try:
                    table = file.read(columns=columns)
                except OSError as error:
                    raise embeddings.damaged(path, error) from None
            table = table.take([images[i] - starts[number] for i in mine])
            for i, row in zip(mine, table.to_pylist()):
                boxes = np.array(row.pop(embeddings.BOXES, []), np.float32).reshape(-1, 4)
                found[i] = {**row, "boxes_xyxy": boxes, "source": part.source}
        return found


def search(
    index: Index,
    queries: Queries,
    *,
    top: int = 10,
    by: str | None = None,
    model: predictor.Predictor | None = None,
    faiss: bool = False,
) -> list[list[Hit]]:
    """The images that fit each query best, each image once, the best first.

    Args:
      index: what is searched.
      queries: a text or several; PIL images; or vectors, float [T, D] of unit length.
      top: K, images a query.
      by: "regions": the score of an image is that of its best region; "images": of the whole image. None: regions for
        texts and vectors, where the index has them; images for images.
      model: of the queries; None: `index.model`.
      faiss: search with FAISS's IndexFlatIP, which holds all vectors in memory.

    Returns:
      For each query at most K hits; equal scores in the order of the index.

    Raises:
      SearchError: the index has no regions, or does not suit the model or the vectors.
      embeddings.EmbeddingsError: a file is damaged.
    """
    vectors, are_images = _vectors_of(index, queries, model)
    if by is None:
        by = "regions" if index.has_regions and not are_images else "images"
    if by not in BY:
        raise SearchError(f"by: got {by!r}, expected {' or '.join(BY)}")
    if by == "regions" and not index.has_regions:
        raise SearchError(f"{index.folder}: has no regions, expected a search by images")
    if top < 1:
        raise SearchError(f"top: got {top}, expected at least 1")
    if not len(vectors):
        return []
    most = max(part.most_regions for part in index.parts) if by == "regions" else 1
    found = (_by_faiss if faiss else _by_blocks)(index, by, vectors, top, most)
    numbers = np.unique(np.concatenate([images for _, images, _ in found]))
    rows = dict(zip(numbers.tolist(), index.rows(numbers.tolist())))
    return [
        [
            Hit(float(score), **rows[image], region=int(region) if by == "regions" else None)
            for score, image, region in zip(scores.tolist(), images.tolist(), regions.tolist())
        ]
        for scores, images, regions in found
    ]


def _vectors_of(
    index: Index, queries: Queries, model: predictor.Predictor | None
) -> tuple[np.ndarray, bool]:
    """The queries as float32 [T, D], and whether they are images."""
    if isinstance(queries, np.ndarray):
        if queries.ndim != 2 or queries.shape[1] != index.embed_dim:
            raise SearchError(
                f"queries: got {list(queries.shape)}, expected [T, {index.embed_dim}] as in {index.folder}"
            )
        return queries.astype(np.float32), False
    if model is not None:
        index.check(model)
    asked: list[Any] = [queries] if isinstance(queries, str) else list(queries)
    if not asked or isinstance(asked[0], str):
        return (model or index.model).encode_text(asked), False
    return (model or index.model).encode_image(asked), True


# Of each query: scores, images and regions, the best first.
_Best: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
_NONE: _Best = (np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int32))


def _by_blocks(index: Index, by: str, queries: np.ndarray, top: int, most: int) -> list[_Best]:
    """The `top` images for each query, of which each has at most `most` vectors."""
    mesh = Mesh(jax.local_devices(), ("block",))
    rows = NamedSharding(mesh, PartitionSpec("block"))
    total = len(index) * most
    size = min(max(1, BLOCK_BYTES // (4 * index.embed_dim)), 1 << (total - 1).bit_length())
    size = -(-size // mesh.size) * mesh.size
    # The best vectors of a block have the best images: each image has at most `most` of them.
    count = min(top * most, size)
    placed = jax.device_put(queries, NamedSharding(mesh, PartitionSpec()))
    best, waiting = [_NONE] * len(queries), None
    for values, images, regions in _blocks(index.vectors(by), size):
        nearest = _nearest(jax.device_put(values, rows), len(images), placed, count=count)
        if waiting is not None:  # read while the devices worked
            best = _merged(best, *waiting, top)
        waiting = (nearest, images, regions)
    return best if waiting is None else _merged(best, *waiting, top)


@functools.partial(jax.jit, static_argnames="count")
def _nearest(values: jax.Array, filled: int, queries: jax.Array, *, count: int) -> Any:
    """The largest `count` products of each query, [T, count], and their rows; of `values` [N, D] the first `filled`."""
    scores = jnp.einsum("nd,td->tn", values.astype(jnp.float32), queries, precision="highest")
    scores = jnp.where(jnp.arange(len(values)) < filled, scores, -jnp.inf)
    return jax.lax.top_k(scores, count)


def _blocks(
    vectors: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(values [size, D], images [n], regions [n]), n <= size: the values behind n are zeros."""
    parts, count = [], 0

    def block() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values, images, regions = map(np.concatenate, zip(*parts))
        missing = ((0, size - len(values)), (0, 0))
        return np.pad(values, missing), images, regions

    for part in vectors:
        while count + len(part[1]) > size:
            room = size - count
            parts.append(tuple(x[:room] for x in part))
            yield block()
            part = tuple(x[room:] for x in part)
            parts, count = [], 0
        parts.append(part)
        count += len(part[1])
    if count:
        yield block()


def _merged(
    best: list[_Best], nearest: Any, images: np.ndarray, regions: np.ndarray, top: int
) -> list[_Best]:
    """`best` with the candidates of a block: the rows of the largest scores, and those."""
    out = []
    for old, scores, at in zip(best, *map(np.asarray, nearest)):
        at = at[np.isfinite(scores)]
        new = (scores[: len(at)], images[at], regions[at])
        scores_, images_, regions_ = map(np.concatenate, zip(old, new))
        order = np.lexsort((regions_, images_, -scores_))
        first = np.unique(images_[order], return_index=True)[1]  # the best vector of each image
        kept = order[np.sort(first)[:top]]
        out.append((scores_[kept], images_[kept], regions_[kept]))
    return out


def _by_faiss(index: Index, by: str, queries: np.ndarray, top: int, most: int) -> list[_Best]:
    """As `_by_blocks`, by FAISS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of SWIG on Python 3.12
            import faiss
    except ModuleNotFoundError as error:
        raise SearchError(
            f"FAISS: needs {error.name}, which is not installed; to get it: pip install 'grain_jax[faiss]', or"
            " search without it"
        ) from None
    flat: Any = faiss.IndexFlatIP(index.embed_dim)
    images, regions = [], []
    for values, of_image, of_region in index.vectors(by):
        flat.add(np.ascontiguousarray(values, np.float32))
        images.append(of_image)
        regions.append(of_region)
    if not flat.ntotal:
        return [_NONE] * len(queries)
    scores, at = flat.search(np.ascontiguousarray(queries), min(top * most, flat.ntotal))
    nearest = (np.where(at < 0, -np.inf, scores), at)
    return _merged(
        [_NONE] * len(queries), nearest, np.concatenate(images), np.concatenate(regions), top
    )
