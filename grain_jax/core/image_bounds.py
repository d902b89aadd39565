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
    offset, parts, exif = 2, 0, []
    while offset + 4 <= len(encoded):
        parts += 1
        if parts > MAX_PARTS:
            return f"got over {MAX_PARTS:,} JPEG segments, expected fewer"
        marker = encoded[offset + 1]
        if encoded[offset] != 0xFF or marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8:
            offset += 1  # filling, or a marker without content: its second byte is no 0xff
            continue
        if marker == 0xDA:
            break
        length = int.from_bytes(encoded[offset + 2 : offset + 4])
        content = encoded[offset + 4 : offset + 2 + length]
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif.append(content[6:])
        if marker == 0xE2 and content.startswith(b"MPF\0"):
            if too_much := _tags_fault(content[4:], "JPEG's MPF"):
                return too_much
        offset += 2 + max(length, 2)
    if exif and (too_much := _tags_fault(b"".join(exif), "JPEG's Exif")):
        return too_much
    if encoded.count(b"\xff\xda") > MAX_SCANS and _scans(encoded, offset) > MAX_SCANS:
        return f"got over {MAX_SCANS} scans of a progressive JPEG, expected about ten"
    return None


def _scans(encoded: bytes, offset: int) -> int:
    """Scans from `offset` to the end of the image (a phone may append a film), or a number above MAX_SCANS."""
    scans = parts = 0
    while scans <= MAX_SCANS and (marker := _MARKER.search(encoded, offset)):
        parts += 1
        if parts > MAX_PARTS:
            return MAX_SCANS + 1
        if marker[0] == b"\xff\xd9":
            break
        scans += marker[0] == b"\xff\xda"
        offset = marker.start() + 2 + int.from_bytes(encoded[marker.end() : marker.end() + 2])
    return scans


def _png_fault(encoded: bytes) -> str | None:
    offset, parts = 8, 0
    while offset + 8 <= len(encoded):
        parts += 1
        if parts > MAX_PARTS:
            return f"got over {MAX_PARTS:,} PNG chunks, expected fewer"
        offset += 12 + int.from_bytes(encoded[offset : offset + 4])
    return None


def _gif_fault(encoded: bytes) -> str | None:
    """Checks the first two frames: Pillow looks for the second to know whether there are several."""
    offset = 6
    for frame in range(2):
        packed = offset + (4 if frame == 0 else 9)  # of the screen, of a frame: has it a palette?
        flags = encoded[packed] if packed < len(encoded) else 0
        offset = packed + (3 if frame == 0 else 2) + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        if frame:  # its pixels
            offset, blocks = _skip_blocks(encoded, offset, len(encoded))
            if blocks > MAX_BYTES >> 8:
                return "got a GIF of short blocks, expected blocks of 255 bytes"
        start, end = offset, min(len(encoded), offset + MAX_GIF_PREAMBLE)
        while offset < end and encoded[offset] not in b",;":
            offset = _skip_blocks(encoded, offset + 2, end)[0] if encoded[offset] == 0x21 else offset + 1
        if offset - start >= MAX_GIF_PREAMBLE:
            return f"got over {MAX_GIF_PREAMBLE:,} bytes of a GIF ahead of a frame, expected fewer"
        if encoded[offset : offset + 1] != b",":
            return None
    return None


def _skip_blocks(encoded: bytes, offset: int, end: int) -> tuple[int, int]:
    """The position after the blocks of a GIF, which end with an empty one, and their number."""
    blocks = 0
    while offset < end and encoded[offset]:
        offset += 1 + encoded[offset]
        blocks += 1
    return offset + 1, blocks


def _tags_fault(encoded: bytes, name: str) -> str | None:
    """Checks the first directory of a TIFF; Exif and MPF have the same format.

    Pillow copies the values of each tag, and several tags may name the same bytes: 1 MB named by every tag
    becomes 64 GB.
    """
    order = _TIFF_HEADS.get(encoded[:4])
    if order is None or len(encoded) < 16:
        return None
    big = b"+" in encoded[:4]
    (offset,) = struct.unpack_from(order + ("Q" if big else "L"), encoded, 8 if big else 4)
    head, entry = order + ("Q" if big else "H"), order + ("HHQ8s" if big else "HHL4s")
    if offset + struct.calcsize(head) > len(encoded):
        return None
    (count,) = struct.unpack_from(head, encoded, offset)
    offset += struct.calcsize(head)
    size = struct.calcsize(entry)
    if count > MAX_PARTS:
        return f"got {count:,} tags in the {name}, expected at most {MAX_PARTS:,}"
    total, tile = 0, {}
    for entry_offset in range(offset, min(offset + count * size, len(encoded) - size + 1), size):
        tag, kind, values, content = struct.unpack_from(entry, encoded, entry_offset)
        unit = _UNIT_BYTES[kind] if kind < len(_UNIT_BYTES) else 0
        length = values * unit
        # The decoder finds a length beyond the file; it may copy what there is.
        total += min(length, len(encoded)) if length > len(content) else 0
        if values > MAX_TAG_VALUES and kind not in _BYTE_TYPES and length <= len(encoded):
            return (
                f"got {values:,} numbers under tag {tag} of the {name}, expected at most {MAX_TAG_VALUES:,}"
            )
        if tag in (_TILE_WIDTH, _TILE_LENGTH) and kind in (3, 4, 16) and values == 1:
            tile[tag] = int.from_bytes(content[:unit], "little" if order == "<" else "big")
    if total > len(encoded):
        return f"got {total:,} bytes of tags in the {name}, expected at most its {len(encoded):,}"
    if len(tile) == 2 and (too_much := pixels_fault((tile[_TILE_WIDTH], tile[_TILE_LENGTH]))):
        return f"{too_much} in a tile"
    return None
