"""Image files made by hand, as no encoder would write them, and mutations of good ones."""

import io
import random
import struct
import zlib

import numpy as np
import PIL.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Ghostscript, which Pillow runs for EPS, would make a file of this name.
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
(MARKER) (w) file closefile showpage
%%EOF
"""


def encode(kind: str, size=(24, 16), **options) -> bytes:
    """A good file."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 9, y * 7, (x + y) * 3], axis=-1) % 256
    out = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(out, kind, **options)
    return out.getvalue()


def mutate(encoded: bytes, seed: int) -> bytes:
    """One to eight changes of bytes, runs, lengths or order, or a cut; which ones, the seed says."""
    rng = random.Random(seed)
    out = bytearray(encoded)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(out)), rng.randrange(1, 32)
        numbers = b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"
        stop, piece = rng.choice(
            (
                (at + 1, bytes([out[at] ^ 1 << rng.randrange(8)])),
                (at + 1, rng.choice((b"\0", b"\1", b"\x7f", b"\x80", b"\xff"))),
                (at + 4, rng.choice(numbers)),
                (at + length, b""),
                (at, out[at : at + length]),
                (at, rng.randbytes(length)),
                (len(out), b""),
            )
        )
        out[at:stop] = piece
        if len(out) < 4:
            break
    return bytes(out)


def png_chunk(name: bytes, content: bytes) -> bytes:
    """With its length and checksum."""
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))


def png(width: int, height: int) -> bytes:
    """An image of zeros, 8 bits of grey; only its first rows are there."""
    data = zlib.compress(b"\0" * (width + 1) * min(height, 1000), 1)
    header = struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0)
    body = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def gif(size: tuple[int, int]) -> bytes:
    """One pixel that claims to be more."""
    head = b"GIF89a" + struct.pack("<HH", *size) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return head + b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0;"


def bmp_of_run_lengths(width: int, height: int) -> bytes:
    """Its pixels skip 255 lines at a time: 255 * width bytes for four."""
    header = struct.pack("<LLLHHLLLLLL", 40, width, height, 1, 8, 1, 4096, 0, 0, 2, 0)
    palette = b"\0\0\0\0\xff\xff\xff\0"
    head = b"BM" + struct.pack("<LHHL", 0, 0, 0, 14 + len(header) + len(palette))
    return head + header + palette + b"\0\2\0\xff" * 1024


def webp_animated(frames: int) -> bytes:
    """An animation."""
    first, *rest = (PIL.Image.new("RGB", (16, 16), (90 * i, 0, 0)) for i in range(frames))
    out = io.BytesIO()
    first.save(out, "WEBP", save_all=True, append_images=rest)
    return out.getvalue()
