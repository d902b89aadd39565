"""Tar shards as img2dataset and webdataset write them (CC3M, CC12M): KEY.jpg with KEY.txt, KEY.json.

The options, `boxes=KEY labels=KEY` and so on, name keys of the JSON (`data/sources/columns.py`). Members of
one sample stand next to each other and share the name up to its first dot. A shard is one tar; its images
are called TAR/MEMBER.
"""

import dataclasses
import itertools
import json
import re
import tarfile
import urllib.parse
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
from etils import epath

from grain_jax.core import images, nearest, regular_file
from grain_jax.data.sources import base, columns, join

_UNWANTED = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, half surrogates


class Tars:
    """A `base.Source` of tars; a subclass has `entry(image, files, options)`."""

    images_are_files: ClassVar[bool] = False

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """One for each tar file in `options.images` or a folder of it, or that one tar."""
        root = epath.Path(options.images)
        if root.is_dir():
            paths = [*root.glob("*.tar"), *root.glob("*/*.tar")]
        else:
            paths = [root] if root.exists() and root.suffix == ".tar" else []
            root = root.parent
        if not paths:
            raise base.SourceError(f"--images {options.images}: got no .tar file, expected some")
        out = []
        for path in paths:
            prefix = path.relative_to(root).with_suffix("").as_posix()
            name = urllib.parse.quote(prefix, safe="", errors="surrogateescape")
            arguments = {"tar": str(path), "prefix": prefix, "label_text": options.label_text}
            out.append(base.SourceShard(name, arguments))
        return sorted(out, key=lambda shard: shard.name)

    def read(self, shard: base.SourceShard) -> Iterator[base.Annotation | base.Fault]:
        """The tar's images as `entry` makes them."""
        prefix, seen = shard.arguments["prefix"], set()
        options = base.Options("", label_text=shard.arguments["label_text"])
        for sample in _samples(epath.Path(shard.arguments["tar"]), prefix):
            yield sample if isinstance(sample, base.Fault) else self._image(*sample, seen, options)

    def _image(
        self, name: str, files: dict[str, Any], seen: set[str], options: base.Options
    ) -> base.Annotation | base.Fault:
        """A sample's image; `seen` are the names of those before it."""
        ending = next(filter(_is_image, files), None)
        if ending is None:
            got = ", ".join(files)
            return base.Fault(name, "no image", f"got {got:.200}, expected an image beside it")
        image = f"{name}.{ending}"
        try:
            _check_name(image, seen)
            if None in files.values():
                most = f"{images.MAX_BYTES:,} bytes, and {base.MAX_TEXT:,} of a text"
                return base.Fault(image, "too large", f"expected an image of at most {most}")
            annotation = self.entry(image, files, options)
        except (ValueError, OverflowError) as error:
            return base.Fault(image, "bad annotation", str(error))
        return join.join(annotation._replace(encoded=files[ending]))

    def entry(self, image: str, files: dict[str, bytes], options: base.Options) -> base.Annotation:
        """What the files of a sample (ending -> content, of its first image alone) say about its image.

        Raises ValueError: they cannot be used; the message becomes the fault's detail.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WebDataset(columns.RowOptions, Tars):
    """Images with the text beside them, else the JSON's `caption`; and what the options name of the JSON."""

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        self._columns(options)  # raises before a tar is read
        return super().shards(options)

    def _columns(self, options: base.Options) -> tuple[list[str], columns.Named]:
        """The keys of the JSON that the options name, and as columns."""
        keys = [x.split(".")[0] for name in columns.NAMES if (x := getattr(self, name))]
        return keys, self.named("webdataset", ["image", "caption", *keys], options)

    def first_row(self, shard: base.SourceShard) -> dict[str, Any]:
        """The JSON of the first sample; empty if there is none."""
        sample = next(_samples(epath.Path(shard.arguments["tar"]), ""), None)
        return metadata(sample[1]) if sample and not isinstance(sample, base.Fault) else {}

    def entry(self, image: str, files: dict[str, bytes], options: base.Options) -> base.Annotation:
        keys, named = self._columns(options)
        row = metadata(files) if keys or "txt" not in files else {}
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"json: no {missing[0]}; {nearest.did_you_mean(missing[0], row)}")
        if not self.caption:
            beside = files.get("txt", b"").decode("utf-8", "replace")
            row["caption"] = beside if "txt" in files else join.text(row.get("caption"))
        _, annotation = self.annotation(image, row, named)
        if isinstance(annotation, base.Fault):
            raise ValueError(annotation.detail)
        return annotation._replace(where="")


_Span = tuple[float, float, float, float, float, float, float]


class _Item(msgspec.Struct):
    caption: str
    ref_exps: list[_Span] | None = None
    noun_chunks: list[_Span] | None = None


class Grit(Tars):
    """GRIT (zzliang/GRIT): tars of img2dataset with the columns `noun_chunks` and `ref_exps` in the JSON.

    Download with `--save_additional_columns '["id","noun_chunks","ref_exps"]'`. An entry is [start, end, x1,
    y1, x2, y2, score]: characters start to end of the caption describe the box, in shares of the image. So
    img2dataset must neither crop nor pad it (`--resize_mode no` or `keep_ratio`).
    """

    def entry(self, image: str, files: dict[str, bytes], options: base.Options) -> base.Annotation:
        expected = "a caption and spans of seven numbers"
        item = regular_file.checked(metadata(files), _Item, "json", expected)
        # Referring expressions hold every noun chunk, with the words that belong to it.
        spans = item.noun_chunks if item.ref_exps is None else item.ref_exps
        if spans is None:
            raise ValueError(
                "got neither ref_exps nor noun_chunks, expected a list; img2dataset keeps them with"
                " --save_additional_columns"
            )
        regions = []
        for start, end, x1, y1, x2, y2, score in spans:
            text = item.caption[int(start) : int(end)]
            regions.append(base.Region((x1, y1, x2, y2), text, score))
        return base.Annotation(image, (item.caption,), regions=regions, drawn_on=base.SHARES)


def _check_name(image: str, seen: set[str]) -> None:
    """Raises ValueError: the name cannot be a file's, or is one of `seen`, which then has it."""
    if image in seen:
        raise ValueError("the name is there twice, expected it once")
    seen.add(image)
    parts = image.split("/")
    if _UNWANTED.search(image) or ".." in parts:
        raise ValueError("expected a name in UTF-8 without control characters and without ..")
    if len(image.encode()) > base.MAX_NAME or max(len(x.encode()) for x in parts) > base.MAX_PART:
        raise ValueError(f"expected a name of at most {base.MAX_NAME} bytes, {base.MAX_PART} for each part")


def metadata(files: dict[str, bytes]) -> dict[str, Any]:
    """The sample's JSON, in which img2dataset has NaN, too; empty if there is none. Raises ValueError."""
    try:
        value = json.loads(files.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json: not JSON ({error}), expected an object") from None
    return regular_file.checked(value, dict[str, Any], "json", "an object")


class _Member(tarfile.TarInfo):
    """A member with a strict check of its header: tarfile takes a broken header for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, expected a member or the tar's end") from None
        # Members that are no file are part of the next one's header, which is read whole.
        if member.size < 0 or (not member.isreg() and member.size > base.MAX_TEXT):
            raise tarfile.ReadError(f"a header says {member.size} bytes")
        return member


def _samples(path: epath.Path, prefix: str) -> Iterator[tuple[str, dict[str, Any]] | base.Fault]:
    """(PREFIX/KEY, ending -> bytes) of each sample, the tar read once; at last what is wrong with it.

    Only a sample's texts and its first image are read; the bytes are None if they are too many.
    """
    try:
        length = regular_file.length(path)
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
            for key, members in itertools.groupby(_members(tar, length or 0), lambda x: x[0]):
                files: dict[str, bytes | None] = {}
                for _, ending, member in members:
                    most = base.MAX_TEXT if ending in ("txt", "json") else 0
                    if _is_image(ending) and not any(map(_is_image, files)):
                        most = images.MAX_BYTES
                    files[ending] = b""
                    if most:
                        fits = 0 <= member.size <= most
                        files[ending] = tar.extractfile(member).read() if fits else None
                yield f"{prefix}/{key}", files
    except Exception as error:  # tarfile also raises ValueError, IndexError, RecursionError
        lost = "the sample before it and all behind it are lost"
        detail = f"{error or type(error).__name__}; {lost}"
        yield base.Fault(f"{prefix}.tar", "damaged shard", detail)


def _members(tar: tarfile.TarFile, length: int) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, ending, member) of each file: a/b.seg.png is ("a/b", "seg.png").

    Raises tarfile.ReadError at the end of the file: tarfile would seek the terabytes that a header claims.
    """
    for member in tar:
        if tar.offset > length:
            raise tarfile.ReadError("unexpected end of data")
        if member.isfile() and not member.issparse():
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, _, ending = name.partition(".")
            yield f"{folder}/{stem}" if folder else stem, ending, member


def _is_image(ending: str) -> bool:
    return f".{ending}".lower() in base.IMAGE_ENDINGS
