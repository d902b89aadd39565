"""Small stand-ins of Debian packages and of the files in them, written from the formats' descriptions."""

import gzip
import io
import json
import struct
import tarfile
import zlib

import numpy as np

from benchmarks.fetch.gcompris import FOLDERS


def deb(files, compression="xz"):
    """The bytes of a package that installs `files` (path -> content, or the bytes of a compressed tar)."""
    members = {"debian-binary": b"2.0\n", "control.tar.gz": _tar({"control": b""}, "gz")}
    data = files if isinstance(files, bytes) else _tar(files, compression)
    members[f"data.tar.{compression}"] = data
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def _tar(files, compression):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"./{path}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def idx(values):
    """An IDX file of bytes."""
    values = np.asarray(values, np.uint8)
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    )


def fashion(ink, labels):
    """(files of dataset-fashion-mnist, SHA-256's input: name -> unpacked content); both splits hold the same."""
    unpacked = {}
    for split in ("train", "t10k"):
        unpacked[f"{split}-images-idx3-ubyte"] = idx(ink)
        unpacked[f"{split}-labels-idx1-ubyte"] = idx(labels)
    files = {
        f"usr/share/datasets/fashion-mnist/{name}.gz": gzip.compress(content)
        for name, content in unpacked.items()
    }
    files["usr/share/doc/dataset-fashion-mnist/copyright"] = b"License: Expat\n"
    return files, unpacked


def resource(files, version=3):
    """A Qt resource of `files` (path -> content); those that end in .json are compressed."""
    tree = {}
    for path, content in files.items():
        folder = tree
        *above, name = path.split("/")
        for part in above:
            folder = folder.setdefault(part, {})
        folder[name] = content
    names, data, nodes = b"", b"", []
    level = [("", tree)]
    first_child = 1
    while level:
        following = []
        for name, item in level:
            at = len(names)
            names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
            if isinstance(item, dict):
                node = struct.pack(">IHII", at, 2, len(item), first_child)
                first_child += len(item)
                following += item.items()
            else:
                flags = 1 if name.endswith(".json") else 0
                packed = struct.pack(">I", len(item)) + zlib.compress(item) if flags else item
                node = struct.pack(">IHHHI", at, flags, 0, 1, len(data))
                data += struct.pack(">I", len(packed)) + packed
            nodes.append(node + (b"\0" * 8 if version >= 2 else b""))
        level = following
    header = 24 if version >= 3 else 20
    nodes = b"".join(nodes)
    places = header, header + len(nodes), header + len(nodes) + len(data)
    out = b"qres" + struct.pack(">4I", version, *places)
    return out + (b"\0" * 4 if version >= 3 else b"") + nodes + data + names


def gcompris(picture, *, word=("f.webp", "flies"), words=None, copyright=b"", more=None):
    """Files of gcompris-qt-data with a picture in each folder; a drawing is listed as `word` (file, description).

    Args:
      words: the list of words as it is in the file; None: of `word` alone.
      more: path below src/activities -> content, of the resource `lang`.
    """
    lesson = {"name": "animal", "content": [dict(zip(("image", "description"), word))]}
    listed = json.dumps([{"content": [lesson]}]).encode() if words is None else words
    files = {f"{folder}/bee.webp": picture for of in FOLDERS.values() for folder in of[:1]}
    files |= {f"lang/resource/words_sample/{word[0]}": picture, **(more or {})}
    files["lang/resource/words_sample.json"] = listed
    installed = {"usr/share/doc/gcompris-qt-data/copyright": copyright}
    for name in {folder.partition("/")[0] for of in FOLDERS.values() for folder in of}:
        own = {f"src/activities/{p}": x for p, x in files.items() if p.startswith(f"{name}/")}
        installed[f"usr/share/gcompris-qt/rcc/{name}.rcc"] = resource(own or {"none": b""})
    return installed
