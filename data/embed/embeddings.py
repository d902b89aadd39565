"""A folder of embeddings, as `grain-jax embed` writes it and `grain-jax search` reads it.

    DIR/settings.json                     what the embeddings are made of
    DIR/data/part-00000-of-00012.parquet  a row an image; whole, or not there
    DIR/faults.jsonl                      a line for each image that was left out
    DIR/README.md                         the data card

With `--format npy` the embeddings are arrays beside the Parquet files (`arrays`). The columns are in docs/embed.md.
pyarrow is imported where a file is read or written.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from etils import epath

from grain_jax.core import errors, printable, regular_file
from grain_jax.data.embed import arrays

SETTINGS, DATA, FAULTS, CARD = "settings.json", "data", "faults.jsonl", "README.md"
IMAGE_EMBED, REGION_EMBED, BOXES = "image_embed", "region_embed", "boxes_xyxy"
TEXT_EMBED, TEXT_DIGESTS = "text_embed", "text_digests"
MAX_FOOTER = 8 << 20  # bytes; it holds the faults of a file; read, it takes thirty times as much
_MAX_SETTINGS = 1 << 20
_FOOTERS = 16  # read at a time
_MAX_SIZE = 1 << 48  # bytes of a file
_MAX_GROUPS = (
    1 << 12
)  # of rows, a thousand each; and columns, which pyarrow nests as deep as they say
_NOTE = b"grain_jax"  # key of a file's own metadata
_AGAIN = "delete it or move it elsewhere, and give the command grain-jax embed again, which makes it anew"

_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
_Orientation = Literal["exif", "file"]
_Path = Annotated[str, msgspec.Meta(max_length=1 << 12, pattern=r"^[^\x00]*$")]


class EmbeddingsError(errors.UserError):
    """A folder of embeddings cannot be read or written; the message is one line."""


class DamagedError(EmbeddingsError):
    """A Parquet file is not what was written."""


class Digests(msgspec.Struct, frozen=True):
    """Of a model (`runtime.saved_model.model_digests`)."""

    model: str
    params: str


class Source(msgspec.Struct, frozen=True):
    """The images; `parts.find` makes it."""

    kind: Literal["folder", "annotations", "tars", "records"]
    path: _Path
    images: _Path  # folder that the paths of a folder or an A.jsonl start from; else ""
    split: str  # of a record set; else ""
    digest: str  # of the names and the order of its images, of the lines of an A.jsonl, of the tars and their sizes


class Settings(msgspec.Struct, frozen=True):
    """What the embeddings of a folder are made of."""

    checkpoint: _Path  # may lie elsewhere later: the digests tell the model
    model: Digests
    embed_dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]  # D
    regions: Literal["", "queries", "given"]  # "": none
    image_size: _Count  # pixels of a side
    dtype: Literal["float32", "bfloat16"]  # of the activations
    store: Literal["float32", "float16"]  # type of the embeddings in the files
    shard_size: _Count  # images a file
    source: Source
    parts: Annotated[int, msgspec.Meta(ge=1, le=10**7)]  # number of files
    orientation: _Orientation  # of the images, as `grain_jax.core.images` takes it
    format: Literal["parquet", "npy"] = "parquet"
    texts: bool = False  # whether there are embeddings of the texts of each image
    logit_scale: float | None = None  # of the model: the factor of the cosines in its loss
    # Patches an image of images in their own shape, at most; 0: squares of `image_size`
    sequence_length: _Count = 0

    @property
    def arrays(self) -> dict[str, bool]:
        """Which vectors there are beside those of the images, as `arrays.paths` takes it."""
        return dict(regions=bool(self.regions), texts=self.texts)

    @property
    def data(self) -> str:
        """The folder of the Parquet files."""
        return DATA if self.format == "parquet" else arrays.METADATA

    def file_name(self, index: int) -> str:
        """The name of Parquet file number `index`."""
        if self.format == "npy":
            return f"{arrays.METADATA}_{arrays.number(index, self.parts)}.parquet"
        return file_name(index, self.parts)

    def difference(self, other: "Settings") -> tuple[str, str, str] | None:
        """The first key with another value in `other`, and the two values in words; a model is told by its digests."""
        for key in self.__struct_fields__[1:]:
            if getattr(self, key) != getattr(other, key):
                return key, self._in_words(key), other._in_words(key)
        return None

    def _in_words(self, key: str) -> str:
        if key == "model":
            return printable.plain(f"{self.checkpoint} (parameters {self.model.params})")
        return json.dumps(msgspec.to_builtins(getattr(self, key)))


class _Piece(msgspec.Struct, tag_field="reader"):
    """A piece of the source, as `parts.images` takes it."""

    name: _Path
    size: _Count


class _Lines(_Piece, tag="annotations"):
    file: _Path
    images: _Path
    first_line: _Count
    start: _Count
    stop: _Count
    lines: _Count
    orientation: _Orientation = "file"


class _Tar(_Piece, tag="webdataset"):
    tar: _Path
    prefix: _Path
    orientation: _Orientation = "file"


class _Records(_Piece, tag="tfds"):
    directory: _Path
    split: str
    start: _Count
    stop: _Count


class _Fault(msgspec.Struct):
    path: str
    cause: str
    detail: str


class _Note(msgspec.Struct):
    """The metadata of a Parquet file, as JSON."""

    name: str  # of the file
    settings: Settings  # of the folder
    images: str  # `piece_digest` of `source`
    most_regions: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    source: _Lines | _Tar | _Records
    faults: list[_Fault]
    regions: _Count = 0  # of all images
    texts: _Count = 0  # of all images


class Part(NamedTuple):
    """What a Parquet file says of itself, without its rows."""

    name: str  # of the file
    rows: int
    most_regions: int  # of one image
    source: dict[str, Any]  # the piece of the source that it is made of, as plain values
    faults: list[dict[str, str]]  # of images that were left out: path, cause, detail
    regions: int = 0  # of all images
    texts: int = 0  # of all images


def pyarrow() -> Any:
    """The package pyarrow, with `parquet`. Raises EmbeddingsError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise EmbeddingsError(
            f"Parquet files need {error.name}, which is not installed; to get it: pip install 'grain_jax[embed]'"
        ) from None
    return pyarrow


def file_name(index: int, count: int) -> str:
    """The name of file number `index` of `count`, of the format parquet."""
    return f"part-{index:05d}-of-{count:05d}.parquet"


def text_digest(text: str) -> int:
    """64 bits that stand for a text, without white space at its ends, among those of an image."""
    digest = hashlib.blake2b(text.strip().encode("utf-8", "ignore"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def piece_digest(settings: Settings, piece: Mapping[str, Any]) -> str:
    """Of the images of a piece, wherever it lies: of its name (for lines with a digest of them), its size, and the source's."""
    said = [settings.source.digest, piece["reader"], piece["name"], piece["size"]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


@functools.cache
def columns(settings: Settings) -> Any:
    """The pyarrow schema of a file."""
    pa = pyarrow()
    embed = pa.list_(getattr(pa, settings.store)(), settings.embed_dim)
    texts = {"parquet": ("id", "path"), "npy": ("image_path", "caption", "id")}[settings.format]
    kinds = dict.fromkeys(texts, pa.string()) | dict(width=pa.int32(), height=pa.int32())
    if settings.format == "parquet":
        kinds |= {IMAGE_EMBED: embed} | (
            {REGION_EMBED: pa.list_(embed)} if settings.regions else {}
        )
    if settings.regions:
        kinds |= {BOXES: pa.list_(pa.list_(pa.float32(), 4))}
    if settings.texts:
        kinds |= {TEXT_DIGESTS: pa.list_(pa.int64())}
        kinds |= {TEXT_EMBED: pa.list_(embed)} if settings.format == "parquet" else {}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def note(part: Part, settings: Settings) -> dict[bytes, bytes]:
    """The metadata of a Parquet file; `read_part` reads them. Raises EmbeddingsError: too many faults for them."""
    said = {key: value for key, value in part._asdict().items() if key != "rows"}
    said |= {"settings": settings, "images": piece_digest(settings, part.source)}
    encoded = msgspec.json.encode(said)
    if len(encoded) > MAX_FOOTER // 2:
        raise EmbeddingsError(
            f"{part.name}: got {len(part.faults):,} faults, more than a file can name; take them out of the source"
        )
    return {_NOTE: encoded}


@contextlib.contextmanager
def open_file(path: epath.PathLike, advice: str = _AGAIN) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile` at `path`, local or remote, as a context; what fails inside is damage, too.

    Args:
      path: the file.
      advice: what to do about damage.

    Raises:
      DamagedError: it is none, or cut off.
      EmbeddingsError: no regular file, or it cannot be read.
    """
    pa, path = pyarrow(), epath.Path(path)
    remote = "://" in str(path)
    try:
        length = regular_file.length(path)
        if length is None:
            raise EmbeddingsError(
                f"{path}: got a folder, pipe or device, expected a Parquet file; move it elsewhere"
            )
        with contextlib.ExitStack() as stack:
            if remote:
                source = Seekable(stack.enter_context(path.open("rb")), length)
            else:
                source = stack.enter_context(pa.OSFile(str(path)))
            source.seek(max(0, length - 8))
            footer = int.from_bytes(source.read(4), "little")
            if footer > MAX_FOOTER:
                raise pa.ArrowInvalid(f"a footer of {footer:,} bytes")
            file = pa.parquet.ParquetFile(
                source,
                page_checksum_verification=True,
                pre_buffer=remote,  # reads a whole file ahead
                thrift_string_size_limit=MAX_FOOTER,
                thrift_container_size_limit=_MAX_GROUPS,
            )
            yield stack.enter_context(file)
    except (OSError, pa.ArrowException, UnicodeError) as error:
        if isinstance(error, MemoryError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise EmbeddingsError(
                f"{path}: {error.strerror}, expected a readable Parquet file"
            ) from None
        raise damaged(path, " ".join(str(error).split()), advice) from None


def damaged(path: epath.PathLike, reason: str, advice: str = _AGAIN) -> DamagedError:
    """The error of a Parquet file whose content is not what was written."""
    return DamagedError(f"{path}: damaged ({printable.plain(reason, 200)}); {advice}")


def flat(column: Any, path: epath.PathLike) -> Any:
    """The values of a pyarrow array of lists, or of lists of lists, without nulls. Raises DamagedError."""
    nested = True
    while nested:
        if column.null_count:
            raise damaged(path, "values are missing")
        nested = hasattr(column, "flatten") and hasattr(column, "values")
        column = column.flatten() if nested else column
    return column


class Seekable(io.RawIOBase):
    """A file of an object store as pyarrow needs it; that of TensorFlow has no `closed`, and its `seek` returns None."""

    def __init__(self, file: Any, length: int):
        self._file, self._length, self._at = file, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def read_part(path: epath.PathLike, settings: Settings) -> Part:
    """What a file of a folder with those settings says of itself; reads its footer alone.

    Raises:
      DamagedError: it is no whole Parquet file.
      errors.UserError: none of grain-jax embed, of another folder, model or source, or of other columns.
    """
    path = epath.Path(path)
    number = re.fullmatch(r"(?:part-|metadata_)(\d{1,8})(-of-\d{5,8})?\.parquet", path.name)
    index = int(number[1]) if number else settings.parts
    if index >= settings.parts or path.name != settings.file_name(index):
        raise EmbeddingsError(f"{path}: expected files of this job alone; move it elsewhere")
    with open_file(path) as file:
        rows, found = file.metadata.num_rows, (file.metadata.metadata or {}).get(_NOTE)
        fault = _columns_fault(file, settings)
    if found is None:
        raise EmbeddingsError(f"{path}: expected a file of grain-jax embed; move it elsewhere")
    note = regular_file.from_json(found, _Note, str(path), f"a note of grain-jax embed; {_AGAIN}")
    source = msgspec.to_builtins(note.source)
    if note.name != path.name:
        fault = f"is {note.name!r} under another name"
    elif difference := note.settings.difference(settings):
        fault = "was made with {} {}, expected {}".format(*difference)
    elif note.images != piece_digest(settings, source):
        fault = f"was made of other images than those of {note.source.name!r}"
    if fault:
        raise EmbeddingsError(f"{path}: {printable.plain(fault, 400)}; {_AGAIN}")
    faults = msgspec.to_builtins(note.faults)
    part = Part(path.name, rows, note.most_regions, source, faults, note.regions, note.texts)
    if fault := _arrays_fault(path.parent.parent, index, part, settings):
        raise damaged(path, fault)
    return part


def _arrays_fault(folder: epath.Path, index: int, part: Part, settings: Settings) -> str | None:
    """Why an array of a part is not whole, or None; of the format parquet there is none."""
    if settings.format == "parquet":
        return None
    files = arrays.paths(folder, index, settings.parts, **settings.arrays)
    counts = [part.rows, *[part.regions] * bool(settings.regions), *[part.texts] * settings.texts]
    sizes = zip(files, counts, strict=True)
    found = (arrays.fault(path, n, settings.embed_dim, settings.store) for path, n in sizes)
    return next(filter(None, found), None)


def read_parts(
    folder: epath.Path, settings: Settings
) -> list[tuple[epath.Path, Part | DamagedError]]:
    """Each Parquet file of a folder, by name, with what it says of itself, or its damage; else raises as `read_part`."""

    def read(path: epath.Path) -> tuple[epath.Path, Part | DamagedError]:
        try:
            return path, read_part(path, settings)
        except DamagedError as error:
            return path, error

    data = folder / settings.data
    files = data.iterdir() if data.is_dir() else ()
    with concurrent.futures.ThreadPoolExecutor(_FOOTERS) as pool:
        return list(pool.map(read, sorted(x for x in files if x.suffix == ".parquet")))


def _columns_fault(file: Any, settings: Settings) -> str | None:
    """What is wrong with the columns and the counts of rows in a footer, or None."""
    expected, told = columns(settings), file.metadata
    if not file.schema_arrow.equals(expected):
        others = [str(field) for field in file.schema_arrow if field not in list(expected)]
        return f"has other columns than {SETTINGS} says: got {(others or ['other ones'])[0]}"
    held = IMAGE_EMBED if IMAGE_EMBED in expected.names else "height"
    at, rows, size = expected.get_field_index(held), 0, 0  # a leaf each, up to that
    for group in map(told.row_group, range(told.num_row_groups)):
        if group.num_columns != told.num_columns:  # pyarrow ends the process where it has more
            return (
                f"has {group.num_columns} columns in a group of rows, expected {told.num_columns}"
            )
        if {group.column(i).compression for i in range(told.num_columns)} != {"UNCOMPRESSED"}:
            return "is compressed, expected plain columns"
        rows, size = rows + max(0, group.num_rows), size + group.column(at).total_uncompressed_size
    kind, count = expected.field(at).type, 1
    if held == IMAGE_EMBED:
        kind, count = kind.value_type, settings.embed_dim
    least = told.num_rows * count * kind.bit_width // 8
    if rows != told.num_rows or least > min(size, _MAX_SIZE):
        return f"has {told.num_rows:,} rows, in groups of {rows:,}, in {size:,} bytes"
    return None


def read_settings(folder: epath.PathLike) -> Settings:
    """What the embeddings of a folder are made of.

    Raises:
      regular_file.FileError: the folder is none of grain-jax embed.
    """
    expected = "settings of a folder that grain-jax embed wrote, of this version"
    return regular_file.read_json(epath.Path(folder) / SETTINGS, Settings, expected, _MAX_SETTINGS)
