"""Which files are shown to a model, and the cause by which each other one is kept away from it."""

import io

import PIL.Image

from grain_jax.data import sources
from grain_jax.data.annotate import checks
from grain_jax.data.annotate.arguments import Annotate
from tests.data.annotate import faults

GIVEN = Annotate(images="", output="")


def test_every_planted_file_has_its_cause(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    expected = faults.plant_files(pictures)
    options = sources.Options(str(pictures), scratch=str(tmp_path / "lists"))
    found = {}
    for shard in sources.shards("folder", options):
        for item in sources.read(shard):
            if isinstance(item, sources.Image):
                item = checks.check(item, GIVEN)
                if isinstance(item, PIL.Image.Image):
                    continue
            assert item.detail and "\n" not in item.detail
            found[item.image] = f"picture: {item.cause}"
    assert found == {name: cause for name, cause in expected.items() if cause}
    assert {name for name in expected if name.startswith("fine_")} == set(expected) - set(found)


def checked(picture, kind, given=GIVEN, **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return checks.check(sources.Image("x", out.getvalue()), given)


def test_a_photograph_with_a_preview_behind_it_is_still():
    picture = PIL.Image.new("RGB", (30, 20), "red")
    preview = picture.resize((16, 16))
    found = checked(picture, "MPO", save_all=True, append_images=[preview])
    assert found.size == (30, 20)


def test_limits_are_inclusive():
    limits = Annotate(images="", output="", min_side=20, max_side=30)
    assert checked(PIL.Image.new("RGB", (30, 20)), "PNG", limits).size == (30, 20)
    assert checked(PIL.Image.new("RGB", (31, 20)), "PNG", limits).cause == "too large"
    fault = checked(PIL.Image.new("RGB", (30, 19)), "PNG", limits)
    assert fault.cause == "too small"
    assert fault.detail == "got 30 x 19 pixels, expected at least 20 a side"
