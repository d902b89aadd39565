"""Bounds on the memory and time that decoding an image file takes, checked before Pillow opens the file.

Pillow bounds the pixels alone; its readers take memory or time without bound for some metadata. So the structure
of each format is walked here first: no pixel is decoded, and no value but lengths is read.
"""

import re
import struct

# RGB of so many pixels is 2^29 bytes, the most that tf.io, which training decodes with, takes. Pillow
# refuses the same number by default. Decoded, it takes 0.7 GB.
MAX_PIXELS = (1 << 29) // 3
# A JPEG has no longer side; PNG has, but libpng reads none above 1,000,000.
MAX_SIDE = 65_500
# A photograph of MAX_PIXELS takes 0.2 to 1.5 bytes a pixel, in JPEG and in PNG.
MAX_BYTES = 256 << 20
# Segments of a JPEG ahead of its pixels, chunks of a PNG: Pillow needs some microseconds for each. Encoders
# that write a PNG in pieces of 8 KB make 32,768 of MAX_BYTES.
MAX_PARTS = 1 << 16
# Each scan of a progressive JPEG goes over all pixels anew; encoders write about ten. libtiff has the same.
MAX_SCANS = 100
# Bytes of a GIF ahead of a frame: Pillow joins comments in quadratic time, half a second for these.
MAX_GIF_PREAMBLE = 4 << 20
# Numbers under one tag of a TIFF: MAX_PIXELS in tiles of 16 x 16 have 700,000 offsets.
MAX_TAG_VALUES = 1 << 20

_TIFF_HEADS = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
_UNIT_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # by a tag's type
_BYTE_TYPES = (1, 2, 6, 7)
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # of a JPEG; neither filling nor a restart
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def fault(encoded: bytes) -> str | None:
    """The bound that a file exceeds, in words, or None. Damage is found by the decoder."""
    if len(encoded) > MAX_BYTES:
        return f"got {len(encoded):,} bytes, expected at most {MAX_BYTES:,}"
    if encoded.startswith(b"\xff\xd8\xff"):
        return _jpeg_fault(encoded)
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_fault(encoded)
    if encoded.startswith((b"GIF87a", b"GIF89a")):
        return _gif_fault(encoded)
    if encoded[:4] in _TIFF_HEADS:
        return _tags_fault(encoded, "TIFF")
    if encoded.startswith(b"BM") and encoded[14:15] != b"\x0c":
        # Pillow unpacks it into up to 255 lines for two bytes, whatever the width.
        if encoded[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
            return "got a BMP with run lengths, expected one of plain pixels"
    return None


def pixels_fault(size: tuple[int, int]) -> str | None:
    """The bound that a width and height exceed, in words, or None."""
    width, height = size
    if width * height > MAX_PIXELS:
        return f"got {width} x {height} pixels, expected at most {MAX_PIXELS:,} in all"
    if max(size) > MAX_SIDE:
        return f"got {width} x {height} pixels, expected at most {MAX_SIDE:,} a side"
    return None


def _jpeg_fault(encoded: bytes) -> str | None:
    at, parts, exif = 2, 0, []
    while at + 4 <= len(encoded):
        parts += 1
        if parts > MAX_PARTS:
            return f"got over {MAX_PARTS:,} JPEG segments, expected fewer"
        marker = encoded[at + 1]
        if encoded[at] != 0xFF or marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8:
            at += 1  # filling, or a marker without content: its second byte is no 0xff
            continue
        if marker == 0xDA:
            break
        length = int.from_bytes(encoded[at + 2 : at + 4])
        content = encoded[at + 4 : at + 2 + length]
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif.append(content[6:])
        if marker == 0xE2 and content.startswith(b"MPF\0"):
            if found := _tags_fault(content[4:], "JPEG's MPF"):
                return found
        at += 2 + max(length, 2)
    if exif and (found := _tags_fault(b"".join(exif), "JPEG's Exif")):
        return found
    if encoded.count(b"\xff\xda") > MAX_SCANS and _scans(encoded, at) > MAX_SCANS:
        return f"got over {MAX_SCANS} scans of a progressive JPEG, expected about ten"
    return None


def _scans(encoded: bytes, at: int) -> int:
    """Scans from `at` to the end of the image (a phone may append a film), or a number above MAX_SCANS."""
    scans = parts = 0
    while scans <= MAX_SCANS and (found := _MARKER.search(encoded, at)):
        parts += 1
        if parts > MAX_PARTS:
            return MAX_SCANS + 1
        if found[0] == b"\xff\xd9":
            break
        scans += found[0] == b"\xff\xda"
        at = found.start() + 2 + int.from_bytes(encoded[found.end() : found.end() + 2])
    return scans


def _png_fault(encoded: bytes) -> str | None:
    at, parts = 8, 0
    while at + 8 <= len(encoded):
        parts += 1
        if parts > MAX_PARTS:
            return f"got over {MAX_PARTS:,} PNG chunks, expected fewer"
        at += 12 + int.from_bytes(encoded[at : at + 4])
    return None


def _gif_fault(encoded: bytes) -> str | None:
    """Checks the first two frames: Pillow looks for the second to know whether there are several."""
    at = 6
    for frame in range(2):
        packed = at + (4 if frame == 0 else 9)  # of the screen, of a frame: has it a palette?
        flags = encoded[packed] if packed < len(encoded) else 0
        at = packed + (3 if frame == 0 else 2) + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        if frame:  # its pixels
            at, blocks = _skip_blocks(encoded, at, len(encoded))
            if blocks > MAX_BYTES >> 8:
                return "got a GIF of short blocks, expected blocks of 255 bytes"
        start, end = at, min(len(encoded), at + MAX_GIF_PREAMBLE)
        while at < end and encoded[at] not in b",;":
            at = _skip_blocks(encoded, at + 2, end)[0] if encoded[at] == 0x21 else at + 1
        if at - start >= MAX_GIF_PREAMBLE:
            return f"got over {MAX_GIF_PREAMBLE:,} bytes of a GIF ahead of a frame, expected fewer"
        if encoded[at : at + 1] != b",":
            return None
    return None


def _skip_blocks(encoded: bytes, at: int, end: int) -> tuple[int, int]:
    """The position after the blocks of a GIF, which end with an empty one, and their number."""
    blocks = 0
    while at < end and encoded[at]:
        at += 1 + encoded[at]
        blocks += 1
    return at + 1, blocks


def _tags_fault(encoded: bytes, what: str) -> str | None:
    """Checks the first directory of a TIFF; Exif and MPF have the same format.

    Pillow copies the values of each tag, and several tags may name the same bytes: 1 MB named by every tag
    becomes 64 GB.
    """
    order = _TIFF_HEADS.get(encoded[:4])
    if order is None or len(encoded) < 16:
        return None
    big = b"+" in encoded[:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "L"), encoded, 8 if big else 4)
    head, entry = order + ("Q" if big else "H"), order + ("HHQ8s" if big else "HHL4s")
    if at + struct.calcsize(head) > len(encoded):
        return None
    (count,) = struct.unpack_from(head, encoded, at)
    at += struct.calcsize(head)
    size = struct.calcsize(entry)
    if count > MAX_PARTS:
        return f"got {count:,} tags in the {what}, expected at most {MAX_PARTS:,}"
    total, tile = 0, {}
    for place in range(at, min(at + count * size, len(encoded) - size + 1), size):
        tag, kind, values, content = struct.unpack_from(entry, encoded, place)
        unit = _UNIT_BYTES[kind] if kind < len(_UNIT_BYTES) else 0
        length = values * unit
        # The decoder finds a length beyond the file; it may copy what there is.
        total += min(length, len(encoded)) if length > len(content) else 0
        if values > MAX_TAG_VALUES and kind not in _BYTE_TYPES and length <= len(encoded):
            return f"got {values:,} numbers under tag {tag} of the {what}, expected at most {MAX_TAG_VALUES:,}"
        if tag in (_TILE_WIDTH, _TILE_LENGTH) and kind in (3, 4, 16) and values == 1:
            tile[tag] = int.from_bytes(content[:unit], "little" if order == "<" else "big")
    if total > len(encoded):
        return f"got {total:,} bytes of tags in the {what}, expected at most its {len(encoded):,}"
    if len(tile) == 2 and (found := pixels_fault((tile[_TILE_WIDTH], tile[_TILE_LENGTH]))):
        return f"{found} in a tile"
    return None
