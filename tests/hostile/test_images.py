import io
import os
import resource

import numpy as np
import PIL.Image
import pytest

from grain_jax.core import images
from grain_jax.data.sources import base, join
from grain_jax.inference import inputs
from tests import record_sets
from tests.hostile import cases, image_files

MB = 1 << 20
# name -> (file, what the error says). Each would take minutes or gigabytes, or run something.
REFUSED = {
    "EPS": (image_files.MARKER_EPS, "no known image format, expected JPEG, PNG, WebP, GIF"),
    "empty": (b"", "0 bytes that are no known"),
    "PNG of 200 Mpx": (lambda: image_files.png(20_000, 10_000), "200000000 pixels|20000 x 10000"),
    "GIF that says 65535 x 65535": (image_files.gif(size=(65535, 65535)), "pixels"),
    "TIFF of one tile of 10^9 pixels": (lambda: image_files.tiff((259, 3, 1, 5), (322, 4, 1, 40_000), (323, 4, 1, 30_000), (324, 4, 1, 8), (325, 4, 1, 1)), "40000 x 30000 pixels, expected at most .* in a tile"),
    "TIFF whose tags share bytes": (lambda: image_files.shared_tags(20_000, MB), "bytes of tags in the TIFF"),
    "TIFF of 2 million strips": (lambda: image_files.tiff((273, 4, 2 * MB, 8), tail=b"\0" * (9 * MB)), "2,097,152 numbers under tag 273"),
    "JPEG whose Exif shares bytes": (lambda: image_files.jpeg_with(*image_files.exif_of_shared_values(8)), "bytes of tags in the JPEG's Exif"),
    "JPEG of 70,000 comments": (lambda: image_files.jpeg_with(image_files.jpeg_segment(0xFE, b"") * 70_000), "over 65,536 JPEG segments"),
    "JPEG of 200 scans": (lambda: image_files.jpeg_of_scans(200), "over 100 scans"),
    "PNG of 70,000 chunks": (lambda: image_files.png(1, 1, image_files.png_chunk(b"tEXt", b"a\0b") * 70_000), "over 65,536 PNG chunks"),
    "GIF of a long comment": (lambda: image_files.gif(between=image_files.gif_comment(6 * MB), frames=2), "bytes of a GIF ahead"),
    "BMP of run lengths": (image_files.bmp_of_run_lengths(170_000_000, 1), "run lengths"),
    "floats": (lambda: float_tiff(), "mode F has no fixed range"),
}  # fmt: skip


def float_tiff():
    out = io.BytesIO()
    PIL.Image.new("F", (2, 2)).save(out, "TIFF")
    return out.getvalue()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_one_line_before_it_costs_anything(name):
    encoded, line = REFUSED[name]
    encoded = encoded() if callable(encoded) else encoded
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(images.ImageError, match=line) as caught:
        images.decode_image(encoded, "a.jpg")
    assert str(caught.value).startswith("a.jpg: ") and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200 << 10  # KB


GOOD = [
    *((kind, image_files.encode(kind)) for kind in image_files.FORMATS),
    ("three frames of WebP", image_files.webp_animated(3)),
    ("a GIF of two frames with a comment", image_files.gif(before=image_files.gif_comment(MB), frames=2)),
    ("100 scans hidden in a thumbnail", image_files.jpeg_with(image_files.jpeg_segment(0xE2, b"\xff\xda\0\2" * 200))),
    ("a JPEG with a film behind it", image_files.encode("JPEG") + b"\xff\xda\0\2" * 200),
    ("a JPEG with Exif", image_files.encode("JPEG", exif=b"Exif\0\0" + image_files.tiff())),
    ("a TIFF of JPEG", image_files.encode("TIFF", compression="jpeg")),
    ("a PNG with texts", image_files.png(2, 2, image_files.png_chunk(b"tEXt", b"a\0b") * 100)),
]  # fmt: skip


@pytest.mark.parametrize("encoded", [row[1] for row in GOOD], ids=[row[0] for row in GOOD])
def test_good_files_pass(encoded):
    expected = PIL.Image.open(io.BytesIO(encoded))
    np.testing.assert_array_equal(np.asarray(images.decode_image(encoded)), np.asarray(expected))


def test_a_reader_that_another_package_registers_is_not_asked(monkeypatch):
    asked = []
    monkeypatch.setitem(PIL.Image.OPEN, "HEIF", (lambda *_: asked.append(1), lambda prefix: True))
    monkeypatch.setattr(PIL.Image, "ID", [*PIL.Image.ID, "HEIF"])
    with pytest.raises(images.UnknownFormatError):
        images.decode_image(b"whatever it is")
    assert not asked


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    path = image_files.not_regular(tmp_path, kind)
    with pytest.raises(images.ImageError, match="got a folder, pipe or device, expected an image"):
        images.load_image(path)
    assert join.load(base.Entry("a.png"), tmp_path).cause == "unreadable"
    record_sets.write_annotations(tmp_path / "in", 2)
    (tmp_path / "in" / "00001.png").unlink()
    path.rename(tmp_path / "in" / "00001.png")
    outcome = cases.run(lambda _: record_sets.build_set(tmp_path / "in", tmp_path / "out"), [])
    cases.check(outcome, r'A.jsonl:2: image: got "00001.png": .*got a folder, pipe or device')


def test_a_link_to_a_file_and_a_long_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(image_files.encode("PNG"))
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert images.load_image(tmp_path / "b.png").size == (24, 16)
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(1 << 40)  # no bytes are behind it
    with pytest.raises(images.TooLargeError, match="1,099,511,627,776 bytes, expected at most 268"):
        images.load_image(tmp_path / "long.png")
    assert join.load(base.Entry("long.png"), tmp_path).cause == "too large"
    # A file without a length, as the kernel has some, which go on for ever.
    if os.path.exists("/proc/self/pagemap"):
        with pytest.raises(images.ImageError, match="0 bytes"):
            images.load_image("/proc/self/pagemap")


def test_pil_pictures_of_every_mode():
    ramp = np.linspace(0, 255, 30 * 20).reshape(30, 20).astype(np.uint8)
    colours = np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1)
    grey, rgb = PIL.Image.fromarray(ramp), PIL.Image.fromarray(colours)
    palette = rgb.quantize(16)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes([0, 128])
    deep = (ramp.astype(np.uint16) << 8) | 77
    clear = rgb.copy()
    clear.putalpha(grey)
    pairs = [
        (grey, grey.convert("RGB")),
        (grey.convert("1"), grey.convert("1").convert("RGB")),
        (palette, palette.convert("RGB")),
        (transparent, palette.convert("RGB")),
        (clear, rgb),  # as in training, transparent pixels keep their colour
        (grey.convert("LA"), grey.convert("RGB")),
        (rgb.convert("CMYK"), rgb),
        (rgb.convert("YCbCr"), rgb.convert("YCbCr").convert("RGB")),
        (PIL.Image.fromarray(deep), grey.convert("RGB")),
        (PIL.Image.fromarray(deep.astype(np.int32)), grey.convert("RGB")),
        (PIL.Image.fromarray(ramp.astype(np.int32)), grey.convert("RGB")),
    ]
    assert {given.mode for given, _ in pairs} >= {"I;16", "I", "P", "CMYK", "RGBA", "LA", "1"}
    for number, (given, same) in enumerate(pairs):
        np.testing.assert_array_equal(inputs.resize(number, given, 16), images.resize(same, 16))
