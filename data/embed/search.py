"""Search by texts, images or vectors over a folder of embeddings that `grain-jax embed` wrote.

    index = search.Index("embeddings")
    for hit in search.search(index, "a long orange beak")[0]:
        print(hit.score, hit.path, hit.box_xyxy)

Exact: every vector is compared, in blocks; memory holds one block whatever the size of the folder.
"""

import functools
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import PIL.Image
from etils import epath

from grain_jax.core import errors, regular_file
from grain_jax.data.embed import embeddings
from grain_jax.inference import predictor
from grain_jax.runtime import saved_model

BY = ("regions", "images")
_BLOCK_BYTES = 64 << 20  # of vectors in float32, and at most so many images
_ROWS = 4096

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
    log_likelihood: float | None = None  # of the text, in nats, where `reranked` asked for it

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
      has_regions: whether it has regions of the images.
      parts: of each file, what it says of itself.
      missing: number of files that are not there yet.

    Raises:
      errors.UserError: it is no such folder, it has no file yet, or one is damaged or of another folder, model or
        source.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder).expanduser()
        self.settings = embeddings.read_settings(self.folder)
        if self.settings.format != "parquet":
            raise embeddings.EmbeddingsError(
                f"{self.folder}: has --format {self.settings.format}, expected parquet, which grain-jax embed writes"
                " to another --output"
            )
        embeddings.pyarrow()
        self.parts: list[embeddings.Part] = []
        names: dict[str, str] = {}
        for path, part in embeddings.read_parts(self.folder, self.settings):
            if isinstance(part, embeddings.DamagedError):
                raise part
            self.parts.append(part)
            if (other := names.setdefault(part.source["name"], part.name)) != part.name:
                raise embeddings.EmbeddingsError(
                    f"{path}: has the images of {other}; delete it, and give the command grain-jax embed again,"
                    " which makes it anew"
                )
        if not len(self):
            raise embeddings.EmbeddingsError(
                f"{self.folder}: got no image there yet, expected Parquet files of grain-jax embed"
            )
        self.embed_dim = self.settings.embed_dim
        self.has_regions = bool(self.settings.regions)
        self.missing = self.settings.parts - len(self.parts)
        self._checked: predictor.Predictor | None = None  # is known to suit
        self._starts = np.cumsum([0, *(part.rows for part in self.parts)])

    def __len__(self) -> int:
        """Number of images."""
        return sum(part.rows for part in self.parts)

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
        length = self.settings.sequence_length
        found = predictor.load(checkpoint, self.settings.dtype, sequence_length=length)
        self.check(found)
        return found

    def check(self, model: predictor.Predictor) -> None:
        """Raises SearchError unless the model made the index, by its digests, and sees images in the same shape."""
        if model is self._checked:
            return
        digests = saved_model.model_digests(model.model, jax.device_get(model.params))
        got, expected = embeddings.Digests(**digests), self.settings.model
        if got != expected:
            raise SearchError(
                f"{self.folder}: was made by another model: {self.settings.checkpoint}, parameters"
                f" {expected.params}, got parameters {got.params}"
            )
        self.check_length(model.sequence_length)
        self._checked = model

    def check_length(self, length: int) -> None:
        """Raises SearchError unless the index was made with so many patches an image, at most (0: squares)."""
        if length != self.settings.sequence_length:
            raise SearchError(
                f"{self.folder}: was made with sequence_length={self.settings.sequence_length}, got {length} (0: squares);"
                " expected the same, or another --output of grain-jax embed"
            )

    def vectors(self, by: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All vectors in order, in blocks.

        Args:
          by: one of BY.

        Yields:
          values float32 [N, D], finite; the image of each, int64 [N], counted over all files; and its position among
          the regions of the image, int32 [N].

        Raises:
          embeddings.EmbeddingsError: a file is damaged.
        """
        name = embeddings.REGION_EMBED if by == "regions" else embeddings.IMAGE_EMBED
        for part, first in zip(self.parts, self._starts.tolist()):
            path, end = self.folder / embeddings.DATA / part.name, first
            most = max(part.most_regions, 1) if by == "regions" else 1
            rows = min(_ROWS, max(_BLOCK_BYTES // (4 * self.embed_dim * most), 1))
            with embeddings.open_file(path) as file:
                for batch in file.iter_batches(rows, columns=[name]):
                    column = batch.column(0)
                    counts = np.ones(len(column), np.int64)
                    if by == "regions":
                        counts = np.diff(column.offsets.to_numpy())
                    flat = embeddings.flat(column, path).to_numpy(zero_copy_only=False)
                    if len(flat) != counts.sum() * self.embed_dim:
                        raise embeddings.damaged(path, f"{len(flat)} numbers in {name}")
                    values = flat.astype(np.float32).reshape(-1, self.embed_dim)
                    if not np.isfinite(values @ np.ones(self.embed_dim, np.float32)).all():
                        raise embeddings.damaged(path, "numbers of an embedding are not finite")
                    if by == "regions" and counts.max(initial=0) > part.most_regions:
                        raise embeddings.damaged(path, f"over {part.most_regions} regions")
                    images = np.repeat(np.arange(end, end + len(counts)), counts)
                    starts = np.repeat(np.cumsum(counts) - counts, counts)
                    regions = (np.arange(len(images)) - starts).astype(np.int32)
                    yield values, images, regions
                    end += len(counts)
            if end - first != part.rows:
                raise embeddings.damaged(path, f"{end - first} rows, expected {part.rows}")

    def path_of(self, image: int) -> epath.Path:
        """The file that has an image, by its number over all files."""
        part = np.searchsorted(self._starts, image, side="right") - 1
        return self.folder / embeddings.DATA / self.parts[part].name

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
            path = self.path_of(self._starts[number])
            with embeddings.open_file(path) as file:
                table = file.read(columns=columns)
                if len(table) != part.rows:
                    raise embeddings.damaged(path, f"{len(table)} rows, expected {part.rows}")
                table = table.take([images[i] - self._starts[number] for i in mine])
                flat = {
                    name: embeddings.flat(table[name].combine_chunks(), path) for name in columns
                }
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
    by = by or ("regions" if index.has_regions and not are_images else "images")
    if by not in BY:
        raise SearchError(f"by: got {by!r}, expected {' or '.join(BY)}")
    if by == "regions" and not index.has_regions:
        raise SearchError(f"{index.folder}: has no regions, expected a search by images")
    if top < 1:
        raise SearchError(f"top: got {top}, expected at least 1")
    if not len(vectors):
        return []
    most = max(part.most_regions for part in index.parts) if by == "regions" else 1
    best = (_by_faiss if faiss else _by_blocks)(index.vectors(by), vectors, top, most)
    found = [list(zip(*(values.tolist() for values in of_query))) for of_query in best]
    numbers = sorted({image for hits in found for _, image, _ in hits})
    rows = dict(zip(numbers, index.rows(numbers)))
    for _, image, region in itertools.chain(*found):
        if by == "regions" and region >= len(rows[image]["boxes_xyxy"]):
            raise embeddings.damaged(index.path_of(image), "a region without a box")
    whole = by == "images"
    return [[Hit(a, **rows[i], region=None if whole else r) for a, i, r in hits] for hits in found]


def reranked(
    model: predictor.Predictor,
    text: str,
    hits: Sequence[Hit],
    images: Sequence[PIL.Image.Image],
    weight: float,
) -> list[Hit]:
    """The first hits of a text in the order of scale * cosine + weight * log-likelihood; the others stay behind them.

    The likelihood is that of the text as the description of the box of the best region, or as the caption of the image.

    Args:
      model: with a text decoder.
      text: that was looked for.
      hits: of `search`.
      images: of the first hits, K.
      weight: of the log-likelihood, in nats.

    Raises:
      inference.InputError: the model has no text decoder.
    """
    first, count = list(hits[: len(images)]), len(images)
    boxes = [hit.box_xyxy for hit in first]
    if not first:
        return list(hits)
    if boxes[0] is None:
        found = model.caption_log_likelihood(list(images), [[text]] * count)
    else:
        several = [np.asarray(box)[None] for box in boxes]
        of_boxes = model.description_log_likelihood(list(images), several, [[[text]]] * count)
        found = [own[0] for own in of_boxes]
    first = [hit._replace(log_likelihood=float(own[0])) for hit, own in zip(first, found)]
    score = lambda hit: model.logit_scale * hit.score + weight * hit.log_likelihood
    return [*sorted(first, key=score, reverse=True), *hits[count:]]


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


# Of each query: scores, images and regions, the best first; and what `Index.vectors` gives.
_Best: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
_Blocks: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
_NONE: _Best = (np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int32))


def _by_blocks(blocks: _Blocks, queries: np.ndarray, top: int, most: int) -> list[_Best]:
    """The `top` images for each query, of which each has at most `most` vectors."""
    best = [_NONE] * len(queries)
    for values, images, regions in blocks:
        # The best vectors of a block have the best images: each image has at most `most` of them.
        few = min(top * most, len(values))
        for i, scores in enumerate(queries @ values.T if few else ()):
            at = np.flatnonzero(scores >= np.partition(scores, -few)[-few])
            best[i] = _merged(best[i], (scores[at], images[at], regions[at]), top)
    return best


def _merged(old: _Best, new: _Best, top: int) -> _Best:
    scores, images, regions = map(np.concatenate, zip(old, new))
    order = np.lexsort((regions, images, -scores))
    first = np.unique(images[order], return_index=True)[1]  # the best vector of each image
    kept = order[np.sort(first)[:top]]
    return scores[kept], images[kept], regions[kept]


def _by_faiss(blocks: _Blocks, queries: np.ndarray, top: int, most: int) -> list[_Best]:
    """As `_by_blocks`, by FAISS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of SWIG on Python 3.12
            import faiss
    except ModuleNotFoundError as error:
        advice = "to get it: pip install 'grain_jax[faiss]', or search without it"
        raise SearchError(f"FAISS: needs {error.name}, which is not installed; {advice}") from None
    flat: Any = faiss.IndexFlatIP(queries.shape[1])
    places: list[tuple[np.ndarray, np.ndarray]] = []
    for values, *place in blocks:
        flat.add(values)
        places.append(place)
    if not flat.ntotal:
        return [_NONE] * len(queries)
    images, regions = map(np.concatenate, zip(*places))
    found = zip(*flat.search(np.ascontiguousarray(queries), min(top * most, flat.ntotal)))
    return [_merged(_NONE, (scores, images[at], regions[at]), top) for scores, at in found]
