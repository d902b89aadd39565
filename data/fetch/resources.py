"""Files of a Qt resource (.rcc), as `rcc --binary` writes them.

The layout is that of qtbase, src/corelib/io/qresource.cpp: a header with the places of three blocks, a tree of nodes
of fixed size, names in UTF-16, and data; numbers are big-endian.
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
    """(path, content) of every file. Those compressed by zstd are left out: Python cannot read them.

    Args:
      content: the resource.
      most: bytes of all its files together, unpacked.

    Raises:
      ResourceError: the content is no resource, damaged, or unpacks to more.
    """
    if content[:4] != b"qres":
        raise ResourceError("is no Qt resource")
    try:
        version, tree, data, names = struct.unpack_from(">4I", content, 4)
        node_size = 22 if version >= 2 else 14  # version 2 adds the time of change
        for path, packed, flags in _below(content, tree, data, names, node_size, 0, "", set()):
            zipped = flags & _ZLIB
            length = struct.unpack_from(">I", packed)[0] if zipped else len(packed)
            most -= length
            if most < 0:
                raise ResourceError("unpacks to too many bytes")
            # 0 would be without a bound.
            unpacked = (
                zlib.decompressobj().decompress(packed[4:], length or 1) if zipped else packed
            )
            if len(unpacked) != length:
                raise ResourceError("is cut off")
            yield path, unpacked
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ResourceError(f"is damaged ({error})") from None


def _below(content, tree, data, names, node_size, number, path, seen):
    if number in seen or len(seen) == _NODES:
        raise ResourceError(f"is damaged (its tree has a loop, or over {_NODES:,} files)")
    seen.add(number)
    at = tree + number * node_size
    name, flags = struct.unpack_from(">IH", content, at)
    if number:  # the root has no name
        (length,) = struct.unpack_from(">H", content, names + name)
        start = names + name + 6  # the length, and a hash of 4 bytes
        letters = content[start : start + 2 * length]
        if len(letters) != 2 * length:
            raise ResourceError("is cut off")
        path = f"{path}/{letters.decode('utf-16-be')}"
        if len(path) > _LONGEST:
            raise ResourceError(f"has a path of over {_LONGEST} characters")
    if flags & _FOLDER:
        count, first = struct.unpack_from(">2I", content, at + 6)
        for child in range(first, first + count):
            yield from _below(content, tree, data, names, node_size, child, path, seen)
        return
    (place,) = struct.unpack_from(">I", content, at + 10)  # behind territory and language
    (length,) = struct.unpack_from(">I", content, data + place)
    packed = content[data + place + 4 : data + place + 4 + length]
    if len(packed) != length:
        raise ResourceError("is cut off")
    if not flags & _ZSTD:
        yield path.removeprefix("/"), packed, flags
