"""Search by texts, images or vectors over a folder of embeddings that `grain-jax embed` wrote.

    index = search.Index("embeddings")
    for hit in search.search(index, "a long orange beak")[0]:
        print(hit.score, hit.path, hit.box_xyxy)

Exact: every vector is compared, in blocks, on all devices; memory holds two blocks whatever the size of the folder.
"""

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

from grain_jax.core import errors, regular_file
from grain_jax.data.embed import embeddings
from grain_jax.inference import predictor
from grain_jax.runtime import saved_model

BY = ("regions", "images")
BLOCK_BYTES = 64 << 20  # of float32; a block and the one after it are in memory
_ROWS = 1024  # read at a time

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
      errors.UserError: it is no such folder, it has no file yet, or one is damaged or of another folder, model or
        source.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder).expanduser()
        self.settings = embeddings.read_settings(self.folder)
        embeddings.pyarrow()
        data = self.folder / embeddings.DATA
        self.parts: list[embeddings.Part] = []
        names: dict[str, str] = {}
        for _, part in embeddings.read_parts(self.folder, self.settings):
            if isinstance(part, embeddings.DamagedError):
                raise part
            self.parts.append(part)
            if (other := names.setdefault(part.source["name"], part.name)) != part.name:
                raise embeddings.EmbeddingsError(
                    f"{data / part.name}: has the images of {other}; delete it, and give the command"
                    " grain-jax embed again, which makes it anew"
                )
        if not len(self):
            raise embeddings.EmbeddingsError(
                f"{data}: got no image there yet, expected Parquet files of grain-jax embed"
            )
        self.embed_dim = self.settings.embed_dim
        self._checked: predictor.Predictor | None = None  # is known to suit
        self.missing = self.settings.parts - len(self.parts)
        self._starts = np.cumsum([0, *(part.rows for part in self.parts)])

    def __len__(self) -> int:
        """Number of images."""
        return sum(part.rows for part in self.parts)

    @property
    def has_regions(self) -> bool:
        """Whether it has regions of the images."""
        return bool(self.settings.regions)

    @functools.cached_property
    def model(self) -> predictor.Predictor:
        """The model that made it, loaded from where it lay then. Raises as `grain_jax.load` and `check`.

        Raises:
          SearchError: it lay on another machine: a name in a file leads nowhere.
        """
        checkpoint = self.settings.checkpoint
        if regular_file.is_remote(checkpoint):
            raise SearchError(
                f"{self.folder}: was made by {checkpoint}, and nothing that a file names is fetched; give"
                f" --checkpoint {checkpoint} (in Python model=grain_jax.load({checkpoint!r})) to fetch it"
            )
        found = predictor.load(checkpoint, self.settings.dtype)
        self.check(found)
        return found

    def check(self, model: predictor.Predictor) -> None:
        """Raises SearchError unless the model is the one that made the index, by its digests."""
        if model is self._checked:
            return
        if model.model.embed_dim != self.embed_dim:
            raise SearchError(
                f"{self.folder}: has embeddings of {self.embed_dim} numbers, got a model with"
                f" {model.model.embed_dim}; expected the model {self.settings.checkpoint}"
            )
        digests = saved_model.model_digests(model.model, jax.device_get(model.params))
        got, expected = embeddings.Digests(**digests), self.settings.model
        if got != expected:
            raise SearchError(
                f"{self.folder}: was made by another model: {self.settings.checkpoint}, parameters"
                f" {expected.params}, got parameters {got.params}"
            )
        self._checked = model

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
        for part, first in zip(self.parts, self._starts.tolist()):
            path, end = self._path(part), first
            with embeddings.open_file(path) as file:
                for batch in file.iter_batches(_ROWS, columns=[name]):
                    column = batch.column(0)
                    counts = np.ones(len(column), np.int64)
                    if by == "regions":
                        counts = np.diff(column.offsets.to_numpy())
                    values = _flat(column, path).to_numpy(zero_copy_only=False)
                    if len(values) != counts.sum() * self.embed_dim:
                        raise embeddings.damaged(path, f"{len(values)} numbers in {name}")
                    if by == "regions" and counts.max(initial=0) > part.most_regions:
                        raise embeddings.damaged(path, f"over {part.most_regions} regions")
                    images = np.repeat(np.arange(end, end + len(counts)), counts)
                    starts = np.repeat(np.cumsum(counts) - counts, counts)
                    regions = (np.arange(len(images)) - starts).astype(np.int32)
                    yield values.reshape(-1, self.embed_dim), images, regions
                    end += len(counts)
            if end - first != part.rows:
                raise embeddings.damaged(path, f"{end - first} rows, expected {part.rows}")

    def _path(self, part: embeddings.Part) -> epath.Path:
        return self.folder / embeddings.DATA / part.name

    def path_of(self, image: int) -> epath.Path:
        """The file that has an image, by its number over all files."""
        return self._path(self.parts[np.searchsorted(self._starts, image, side="right") - 1])

    def rows(self, images: Sequence[int]) -> list[dict[str, Any]]:
        """The columns without embeddings of images, by their number over all files, and the `source` of each.

        Raises:
          embeddings.EmbeddingsError: a file is damaged.
        """
        of_part = np.searchsorted(self._starts, np.asarray(images), side="right") - 1
        columns = ["id", "path", "width", "height", *([embeddings.BOXES] * self.has_regions)]
        found: list[dict[str, Any]] = [{}] * len(images)
        for number in np.unique(of_part).tolist():
            part, mine = self.parts[number], np.flatnonzero(of_part == number).tolist()
            path = self._path(part)
            with embeddings.open_file(path) as file:
                table = file.read(columns=columns)
                if len(table) != part.rows:
                    raise embeddings.damaged(path, f"{len(table)} rows, expected {part.rows}")
                table = table.take([images[i] - self._starts[number] for i in mine])
                flat = {name: _flat(table[name].combine_chunks(), path) for name in columns}
                rows = table.to_pylist()
            corners = np.asarray(flat.get(embeddings.BOXES, ()), np.float32)
            if not ((corners >= 0) & (corners <= 1)).all():
                raise embeddings.damaged(path, "a box is not in [0, 1]")
            if min(min(row["width"], row["height"]) for row in rows) < 1:
                raise embeddings.damaged(path, "an image without pixels")
            for i, row in zip(mine, rows):
                boxes = np.array(row.pop(embeddings.BOXES, []), np.float32).reshape(-1, 4)
                found[i] = {**row, "boxes_xyxy": boxes, "source": part.source}
        return found


def _flat(column: Any, path: epath.Path) -> Any:
    """The values of a pyarrow array of lists, or of lists of lists, without nulls. Raises DamagedError."""
    nested = True
    while nested:
        if column.null_count:
            raise embeddings.damaged(path, "values are missing")
        nested = hasattr(column, "flatten") and hasattr(column, "values")
        column = column.flatten() if nested else column
    return column


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
    if by == "regions":
        for _, images, regions in found:
            for image, region in zip(images.tolist(), regions.tolist()):
                if region >= len(rows[image]["boxes_xyxy"]):
                    raise embeddings.damaged(index.path_of(image), "a region without a box")
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
        if not np.isfinite(queries).all():
            raise SearchError("queries: got numbers that are not finite, expected unit length")
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
            best = _merged(index, best, *waiting, top)
        waiting = (nearest, images, regions)
    return best if waiting is None else _merged(index, best, *waiting, top)


@functools.partial(jax.jit, static_argnames="count")
def _nearest(values: jax.Array, filled: int, queries: jax.Array, *, count: int) -> Any:
    """Of `values` [N, D] the first `filled` count.

    Returns: the largest `count` products of each query, [T, count], and their rows; and the first row with numbers that
      are not finite, or N.
    """
    scores = jnp.einsum("nd,td->tn", values.astype(jnp.float32), queries, precision="highest")
    inside = jnp.arange(len(values)) < filled
    # A product with any number that is not finite is not finite, whatever the query.
    faults = inside & ~jnp.isfinite(scores).all(axis=0)
    scores = jnp.where(inside, scores, -jnp.inf)
    return *jax.lax.top_k(scores, count), jnp.where(faults.any(), faults.argmax(), len(values))


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
    index: Index,
    best: list[_Best],
    nearest: Any,
    images: np.ndarray,
    regions: np.ndarray,
    top: int,
) -> list[_Best]:
    """`best` with the candidates of a block: the largest scores, their rows, the first row that is not finite."""
    *nearest, fault = map(np.asarray, nearest)
    if fault < len(images):
        raise embeddings.damaged(
            index.path_of(int(images[fault])), "numbers of an embedding are not finite"
        )
    out = []
    for old, scores, at in zip(best, *nearest):
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
    images, regions, fault = [], [], np.iinfo(np.int64).max
    for values, of_image, of_region in index.vectors(by):
        if not np.isfinite(values).all():
            faulty = int(np.isfinite(values).all(axis=1).argmin())
            fault = min(fault, flat.ntotal + faulty)
        flat.add(np.ascontiguousarray(values, np.float32))
        images.append(of_image)
        regions.append(of_region)
    if not flat.ntotal:
        return [_NONE] * len(queries)
    scores, at = flat.search(np.ascontiguousarray(queries), min(top * most, flat.ntotal))
    nearest = (np.where(at < 0, -np.inf, scores), at, fault)
    none = [_NONE] * len(queries)
    return _merged(index, none, nearest, np.concatenate(images), np.concatenate(regions), top)
