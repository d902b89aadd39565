"""Images that their EXIF orientation turns, and upright copies: a viewer shows the same pixels and boxes."""

import io
import json
import struct
import zlib

import numpy as np
import PIL.Image

SIZE = 24, 40  # width, height, as a viewer shows them
# What a viewer shows of the stored pixels [H, W, 3], by the tag.
SHOWN = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}
KINDS = {
    "JPEG": {"quality": 95},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "PNG": {},
    "PNG behind": {},  # eXIf behind the pixels
}


def exif(orientation):
    """An Exif block with the tag alone."""
    return struct.pack(">2sHLHHHLHHL", b"MM", 42, 8, 1, 274, 3, 1, orientation, 0, 0)


def encode(pixels, kind, orientation, block=None):
    """A file whose stored pixels are `pixels` [H, W, 3], with the tag (or another Exif block)."""
    out, block = io.BytesIO(), exif(orientation) if block is None else block
    options = {"exif": b"Exif\0\0" + block}
    if kind == "TIFF":
        options = {"tiffinfo": {274: orientation}}
    if kind == "PNG behind":
        options = {}
    PIL.Image.fromarray(pixels).save(out, kind.split()[0], **KINDS[kind], **options)
    if kind == "PNG behind":
        chunk = b"eXIf" + block
        chunk = struct.pack(">L", len(block)) + chunk + struct.pack(">L", zlib.crc32(chunk))
        return out.getvalue()[:-12] + chunk + out.getvalue()[-12:]
    return out.getvalue()


def files():
    """name -> (file, what a viewer shows: uint8 [40, 24, 3]), each orientation of each kind; 35 turned."""
    encoded_files = {}
    for kind in KINDS:
        for tag, show in SHOWN.items():
            rng = np.random.default_rng(len(encoded_files))
            width, height = SIZE if tag < 5 else SIZE[::-1]
            coarse = PIL.Image.fromarray(rng.integers(0, 256, (5, 3, 3), dtype=np.uint8))
            stored = np.asarray(coarse.resize((width, height)))
            encoded = encode(stored, kind, tag)
            if kind == "JPEG":
                stored = np.asarray(PIL.Image.open(io.BytesIO(encoded)))
            name = f"{len(encoded_files):02}.{kind.split()[0].lower()}"
            encoded_files[name] = (encoded, show(stored))
    return encoded_files


def write(folder):
    """Writes FOLDER/turned and FOLDER/upright: images, and an A.jsonl with the same lines."""
    rng = np.random.default_rng(0)
    lines = []
    for which in ("turned", "upright"):
        (folder / which).mkdir(parents=True)
    for number, (name, (encoded, shown)) in enumerate(files().items()):
        (folder / "turned" / name).write_bytes(encoded)
        PIL.Image.fromarray(np.ascontiguousarray(shown)).save(folder / "upright" / name, "PNG")
        x, y = rng.integers(0, 10), rng.integers(0, 20)
        box = [int(x), int(y), int(x) + 12, int(y) + 16]
        region = {"box": box, "description": f"part {number}", "score": 1.0}
        lines.append({"image": name, "caption": f"text {number}", "regions": [region]})
    for which in ("turned", "upright"):
        (folder / which / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines
