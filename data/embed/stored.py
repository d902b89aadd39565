"""Embeddings of a record set, found by record: what a run with teacher.kind=embeddings joins to its batches.

    teacher = Stored("embeddings", "tiny_set", directory, "train")
    teacher.images(numbers)         # of records, by their number in the split
    teacher.texts(numbers, texts)   # of a text of each

Memory: arrays of --format npy are mapped, so that it holds the pages that are read; Parquet files are read whole, and at
most `_CACHE_BYTES` of them (or one) are kept. The order of the data reads shards as a whole, so few files are in use.
"""

import collections
import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from etils import epath

from grain_jax.core import printable, regular_file
from grain_jax.data.embed import arrays, embeddings, parts
from grain_jax.data.embed.embeddings import EmbeddingsError

_CACHE_BYTES = 1 << 30
_PATH = re.compile(r".*/(\d{1,15})(\.\w+)?")  # of a record: split and number
_AGAIN = "expected those of grain-jax embed over this record set"


class _Rows(NamedTuple):
    """The rows of a part, in the order of the records."""

    numbers: np.ndarray  # int64 [n], ascending
    image_embed: np.ndarray  # [n, D]
    text_keys: np.ndarray  # int64 [T], `_keys` of the texts, ascending
    text_rows: np.ndarray  # int64 [T], the row of each key in `text_embed`
    text_embed: np.ndarray  # [T, D], of the texts of all records, one record after the other


def describe(path: epath.PathLike, names: Sequence[str] = ()) -> embeddings.Settings:
    """What the embeddings of a folder are made of; with `names`, of a mixture of sets, those of the first.

    Raises:
      errors.UserError: the folder is none of grain-jax embed.
    """
    return embeddings.read_settings(_folder(path, next(iter(names), "")))


def of_sets(
    path: epath.PathLike, sets: Sequence[tuple[str, epath.Path, str]], apart: bool
) -> list["Stored"]:
    """The embeddings of record sets, of one model.

    Args:
      path: the folder that grain-jax embed wrote.
      sets: name, folder and split of each.
      apart: whether `path` holds a folder for each set, by its name.

    Raises:
      errors.UserError: as `Stored`; or two sets were embedded by different models.
    """
    found = [Stored(_folder(path, one[0] if apart else ""), *one) for one in sets]
    first = found[0].settings
    for one in found[1:]:
        for key in ("model", "texts", "embed_dim", "sequence_length"):
            if getattr(one.settings, key) != getattr(first, key):
                raise EmbeddingsError(
                    f"{one.folder}: {key} is not that of {found[0].folder}; expected all sets embedded by one command"
                    " of grain-jax embed with the same --checkpoint, --sequence-length and --texts"
                )
    return found


def digest(path: epath.PathLike, names: Sequence[str] = ()) -> str:
    """Tells embeddings from others: of the settings and the files of the folder, or of those of all sets."""
    said = []
    for name in names or ("",):
        folder = _folder(path, name)
        settings = embeddings.read_settings(folder)
        made_of = [settings.model, settings.source.digest, settings.store, settings.texts]
        made_of += [settings.sequence_length] if settings.sequence_length else []
        rows = [(p.name, p.rows, p.texts) for p in _parts(folder, settings)]
        said.append([made_of, rows])
    return hashlib.sha256(msgspec.json.encode(said)).hexdigest()[:16]


def _folder(path: epath.PathLike, name: str) -> epath.Path:
    folder = epath.Path(path).expanduser()
    return folder / name if name else folder


def _parts(folder: epath.Path, settings: embeddings.Settings) -> list[embeddings.Part]:
    """All files of a folder, in order. Raises errors.UserError: one is missing or damaged."""
    found = []
    for _, part in embeddings.read_parts(folder, settings):
        if isinstance(part, embeddings.DamagedError):
            raise part
        found.append(part)
    if len(found) != settings.parts:
        raise EmbeddingsError(
            f"{folder}: got {len(found)} of {settings.parts} files, expected all; give the command grain-jax embed again"
        )
    return found


class Stored:
    """The embeddings of a record set. To open them reads the ends of their files alone.

    Args:
      folder: that grain-jax embed wrote.
      name: of the record set, for errors.
      directory: of the record set.
      split: of the record set.

    Attributes:
      settings: what they are made of.
      embed_dim: Dt.
      has_texts: whether there are embeddings of texts.

    Raises:
      errors.UserError: the folder is none of grain-jax embed, unfinished, damaged, or of another set or split.
    """

    def __init__(self, folder: epath.PathLike, name: str, directory: epath.Path, split: str):
        self.folder, self._set = epath.Path(folder), f"{name!r} ({split})"
        self.settings = settings = embeddings.read_settings(self.folder)
        source = settings.source
        if source.kind != "records" or source.split != split:
            got = f"{source.kind} {source.path}" + (f", split {source.split}" * bool(source.split))
            raise EmbeddingsError(
                f"{folder}: got embeddings of {printable.plain(got, 200)}, expected those of the record set {self._set}:"
                f" grain-jax embed {directory} --split {split}"
            )
        embeddings.pyarrow()
        self._parts = _parts(self.folder, settings)
        what = "the description of a record set"
        known = regular_file.read(directory / "dataset_info.json", regular_file.MAX_JSON, what)
        named = [(part.source["name"], part.source["size"]) for part in self._parts]
        if parts.digest_of(named, known) != source.digest:
            raise EmbeddingsError(
                f"{folder}: got embeddings of another record set than {directory}, expected those of {self._set}; embed it"
                " with grain-jax embed, or name the set that was embedded"
            )
        missing = sum(p.source["stop"] - p.source["start"] - p.rows for p in self._parts)
        if missing:
            raise EmbeddingsError(
                f"{folder}: {missing:,} records of {self._set} have no embedding ({embeddings.FAULTS} says why);"
                f" {_AGAIN}, without faults"
            )
        self.embed_dim, self.has_texts = settings.embed_dim, settings.texts
        self._stops = np.array([part.source["stop"] for part in self._parts])
        self._cache: collections.OrderedDict[int, _Rows] = collections.OrderedDict()

    def images(self, numbers: np.ndarray) -> np.ndarray:
        """Embeddings of images, float32 [n, Dt].

        Args:
          numbers: int64 [n], of the records in the split.

        Raises:
          errors.UserError: a record has none, or a file is damaged.
        """
        found = np.empty((len(numbers), self.embed_dim), np.float32)
        for index, at in self._by_part(numbers):
            rows = self._rows(index)
            found[at] = rows.image_embed[self._places(rows, numbers[at])]
        return self._finite(found)

    def texts(self, numbers: np.ndarray, texts: Sequence[bytes]) -> np.ndarray:
        """Embeddings of a text of each record, float32 [n, Dt]; text in UTF-8. Raises as `images`; or a text has none."""
        found = np.empty((len(numbers), self.embed_dim), np.float32)
        said = [text.decode("utf-8", "replace") for text in texts]
        digests = np.array([embeddings.text_digest(text) for text in said], np.int64)
        for index, at in self._by_part(numbers):
            rows = self._rows(index)
            keys = _keys(self._places(rows, numbers[at]), digests[at])
            places = np.searchsorted(rows.text_keys, keys)
            there = places < len(rows.text_keys)
            there[there] = rows.text_keys[places[there]] == keys[there]
            if not there.all():
                i = at[~there][0]
                raise EmbeddingsError(
                    f"{self.folder}: record {numbers[i]} of {self._set} has no embedding of its text"
                    f" {printable.plain(said[i], 60)!r}; {_AGAIN}, with --texts"
                )
            found[at] = rows.text_embed[rows.text_rows[places]]
        return self._finite(found)

    def _by_part(self, numbers: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(part, places in `numbers` of its records) for each part that has some."""
        of = np.searchsorted(self._stops, numbers, side="right")
        return [(index, np.flatnonzero(of == index)) for index in np.unique(of).tolist()]

    def _places(self, rows: _Rows, numbers: np.ndarray) -> np.ndarray:
        at = np.searchsorted(rows.numbers, numbers)
        there = at < len(rows.numbers)
        there[there] = rows.numbers[at[there]] == numbers[there]
        if not there.all():
            raise EmbeddingsError(
                f"{self.folder}: record {numbers[~there][0]} of {self._set} has no embedding; {_AGAIN}, without faults"
            )
        return at

    def _finite(self, found: np.ndarray) -> np.ndarray:
        if not np.isfinite(found).all():
            raise EmbeddingsError(
                f"{self.folder}: damaged (numbers of an embedding are not finite); delete the folder and embed again"
            )
        return found

    def _rows(self, index: int) -> _Rows:
        if index >= len(self._parts):
            raise EmbeddingsError(f"{self.folder}: has fewer records than {self._set}; {_AGAIN}")
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        self._cache[index] = rows = self._read(index)
        held = lambda: sum(x.nbytes for r in self._cache.values() for x in r if _is_held(x))
        while len(self._cache) > 1 and held() > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return rows

    def _read(self, index: int) -> _Rows:
        settings, part = self.settings, self._parts[index]
        path = self.folder / settings.data / part.name
        of_file = settings.format == "parquet"
        vectors = (embeddings.IMAGE_EMBED, *[embeddings.TEXT_EMBED] * settings.texts)
        names = ["path" if of_file else "image_path", *[embeddings.TEXT_DIGESTS] * settings.texts]
        with embeddings.open_file(path) as file:
            table = file.read(columns=[*names, *(vectors if of_file else ())])
            columns: Any = {name: table[name].combine_chunks() for name in table.column_names}
            flat = {name: embeddings.flat(column, path) for name, column in columns.items()}
        numbers = _numbers(flat[names[0]].to_pylist(), part, path)
        counts, digests = np.zeros(len(numbers), np.int64), np.zeros(0, np.int64)
        if settings.texts:
            counts = columns[embeddings.TEXT_DIGESTS].value_lengths().to_numpy()
            digests = flat[embeddings.TEXT_DIGESTS].to_numpy()
            lists = columns.get(embeddings.TEXT_EMBED)  # of Parquet
            if len(digests) != part.texts or (
                lists is not None and (lists.value_lengths().to_numpy() != counts).any()
            ):
                raise embeddings.damaged(path, "its texts are not those of their embeddings")
        sizes = dict(zip(vectors, (len(numbers), len(digests))))
        found = {embeddings.TEXT_EMBED: np.zeros((0, self.embed_dim), np.float32)}
        files = arrays.paths(self.folder, index, settings.parts, **settings.arrays)
        for name, file in zip(vectors, (files[0], files[-1])):
            if not of_file:
                found[name] = arrays.mapped(file, sizes[name], self.embed_dim, settings.store)
                continue
            values = flat[name].to_numpy(zero_copy_only=False)
            if len(values) != sizes[name] * self.embed_dim:
                raise embeddings.damaged(path, f"{len(values)} numbers in {name}")
            found[name] = values.reshape(-1, self.embed_dim)
        embeds = found[embeddings.IMAGE_EMBED], found[embeddings.TEXT_EMBED]
        keys = _keys(np.repeat(np.arange(len(numbers)), counts), digests)
        order = np.argsort(keys, kind="stable")
        return _Rows(numbers, embeds[0], keys[order], order, embeds[1])


def _keys(places: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """64 bits that stand for a text among those of all records of a part, int64 [T], by the places of the records."""
    return digests ^ (places.astype(np.int64) * -0x61C8864680B583EB)  # 2**64 / golden ratio, odd


def _is_held(array: np.ndarray) -> bool:
    return not isinstance(array, np.memmap)


def _numbers(paths: Sequence[str], part: embeddings.Part, where: epath.Path) -> np.ndarray:
    """The number of each record of a part, int64 [n], by its path."""
    found = [_PATH.fullmatch(path) for path in paths]
    numbers = np.array([int(match[1]) if match else -1 for match in found], np.int64)
    inside = (numbers >= part.source["start"]) & (numbers < part.source["stop"])
    if len(numbers) != part.rows or not inside.all() or (np.diff(numbers) <= 0).any():
        raise embeddings.damaged(where, "its paths are not those of its records in their order")
    return numbers
