"""Files of a Qt resource (.rcc), as `rcc --binary` writes them (qtbase, src/corelib/io/qresource.cpp).

A header has the places of three blocks: a tree of nodes of fixed size, names in UTF-16, data. Numbers are big-endian.
"""

import struct
import zlib
from collections.abc import Iterator

_ZLIB, _FOLDER, _ZSTD = 1, 2, 4  # flags of a node
_NODES = 100_000
_LONGEST = 300  # characters of a path


class ResourceError(ValueError):
    """No resource of this format; the message is a phrase."""


def files(content: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file but those compressed by zstd.

    Args:
      content: the resource.
      most: bytes of all its files together, unpacked.

    Raises:
      ResourceError: the content is no resource, damaged, or unpacks to more.
    """
    if content[:4] != b"qres":
        raise ResourceError("is no Qt resource")
    try:
        for path, packed, zipped in _nodes(content):
            length = struct.unpack_from(">I", packed)[0] if zipped else len(packed)
            most -= length
            if most < 0:
                raise ResourceError("unpacks to too many bytes")
            if zipped:  # a bound of 0 would be none
                packed = zlib.decompressobj().decompress(packed[4:], length or 1)
            yield path, _whole(packed, length)
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ResourceError(f"is damaged ({error})") from None


def _whole(part: bytes, length: int) -> bytes:
    if len(part) != length:
        raise ResourceError("is cut off")
    return part


def _nodes(content: bytes) -> Iterator[tuple[str, bytes, int]]:
    """(path, content as stored, whether by zlib) of the files, from the root down."""
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    size = 22 if version >= 2 else 14  # of a node; version 2 adds the time of change
    seen: set[int] = set()

    def below(number: int, path: str) -> Iterator[tuple[str, bytes, int]]:
        if number in seen or len(seen) == _NODES:
            raise ResourceError(f"is damaged (its tree has a loop, or over {_NODES:,} files)")
        seen.add(number)
        at = tree + number * size
        name, flags = struct.unpack_from(">IH", content, at)
        if number:  # the root has no name
            (length,) = struct.unpack_from(">H", content, names + name)
            start = names + name + 6  # the length, and a hash of 4 bytes
            letters = _whole(content[start : start + 2 * length], 2 * length)
            path += f"/{letters.decode('utf-16-be')}"
            if len(path) > _LONGEST:
                raise ResourceError(f"has a path of over {_LONGEST} characters")
        if flags & _FOLDER:
            count, first = struct.unpack_from(">2I", content, at + 6)
            for child in range(first, first + count):
                yield from below(child, path)
            return
        (place,) = struct.unpack_from(">I", content, at + 10)  # behind territory and language
        (length,) = struct.unpack_from(">I", content, data + place)
        start = data + place + 4
        packed = _whole(content[start : start + length], length)
        if not flags & _ZSTD:
            yield path.removeprefix("/"), packed, flags & _ZLIB

    return below(0, "")
