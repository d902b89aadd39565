import io
import os
import resource

import PIL.Image
import pytest

from grain_jax.core import images
from grain_jax.data.sources import base, join
from tests.hostile import image_files

pytestmark = pytest.mark.quick

MB = 1 << 20
# name -> (file, what the error says). Each would take minutes or gigabytes, or run something.
REFUSED = {
    "EPS": (image_files.EPS, "no known image format, expected JPEG, PNG, WebP, GIF"),
    "PNG of 200 Mpx": (lambda: image_files.png(20_000, 10_000), "200000000 pixels"),
    "GIF that says 65535 x 65535": (image_files.gif((65535, 65535)), "pixels"),
    "BMP of run lengths": (image_files.bmp_of_run_lengths(170_000_000, 1), "run lengths"),
    "32 bits a colour": (lambda: of_mode("I"), "mode I has no fixed range, expected 8 or 16 bits"),
    "floats": (lambda: of_mode("F"), "mode F has no fixed range, expected 8 or 16 bits a colour"),
}  # fmt: skip


def of_mode(mode):
    """A file of one pixel; 70,000 in 16 bits became 17."""
    out = io.BytesIO()
    PIL.Image.new(mode, (1, 1), 70_000).save(out, "TIFF")
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


def test_a_reader_that_another_package_registers_is_not_asked(monkeypatch):
    asked = []
    monkeypatch.setitem(PIL.Image.OPEN, "HEIF", (lambda *_: asked.append(1), lambda prefix: True))
    monkeypatch.setattr(PIL.Image, "ID", [*PIL.Image.ID, "HEIF"])
    with pytest.raises(images.ImageError, match="no known image format"):
        images.decode_image(b"whatever it is")
    assert not asked


def test_links_and_files_that_are_no_images_of_a_length(tmp_path):
    (tmp_path / "a.png").write_bytes(image_files.encode("PNG"))
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert images.load_image(tmp_path / "b.png").size == (24, 16)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zeros.png"):
        with pytest.raises(images.ImageError, match="got a folder, pipe or device, expected an im"):
            images.load_image(tmp_path / name)
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # no bytes are behind it
    with pytest.raises(images.TooLargeError, match="268,435,457 bytes, expected at most 268,435,456"):
        images.load_image(tmp_path / "long.png")
    assert join.load(base.Annotation("long.png"), tmp_path).cause == "too large"
    # A file without a length, as the kernel has some, which go on for ever.
    if os.path.exists("/proc/self/pagemap"):
        with pytest.raises(images.ImageError, match="0 bytes"):
            images.load_image("/proc/self/pagemap")
