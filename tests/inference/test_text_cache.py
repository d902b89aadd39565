import dataclasses

import jax
import numpy as np
import pytest

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.inference import text_cache
from tests import perturbed

TEXTS = ["a photo of a wren", "a long tail", "x"]


@pytest.fixture(scope="module")
def model():
    config = perturbed.tiny(image__depth=1, text__depth=1, text__vocab_size=49408)
    return config, perturbed.params(config)


class _Counting(inference.Predictor):
    calls = 0

    def encode_text(self, texts):
        self.calls += 1
        return super().encode_text(texts)


def _cached(model, params, folder, **options):
    return text_cache.CachedTexts(_Counting(model, params, **options), folder)


def test_a_hit_is_the_miss_and_a_damaged_file_is_written_anew(model, tmp_path):
    folder = tmp_path / "a" / "b"
    first = _cached(*model, folder)
    miss = first.encode_text(TEXTS)
    np.testing.assert_array_equal(miss, inference.Predictor(*model).encode_text(TEXTS))
    hits = _cached(*model, folder)  # as another run would
    np.testing.assert_array_equal(hits.encode_text(TEXTS), miss)
    assert (first.calls, hits.calls) == (1, 0)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-100], b"\0" * len(whole), whole[:300] + b"\7" * 8 + whole[308:]):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(hits.encode_text(TEXTS), miss)
        assert file.read_bytes() == whole
    assert hits.calls == 4
    # All else is the predictor's own.
    assert hits.model == model[0] and hasattr(hits, "encode_image_and_regions")
    assert not hasattr(hits, "no_such_thing")


def test_the_key_is_all_that_the_embeddings_depend_on(model, tmp_path):
    config, params = model
    cached = lambda config=config, params=params, **more: _cached(config, params, tmp_path, **more)
    cached().encode_text(TEXTS)
    projection = params["text_projection"]
    other_tower = params | {"text_projection": jax.tree.map(lambda x: x + 1e-3, projection)}
    other_text = dataclasses.replace(config.text, activation="gelu")
    for predictor, texts in (
        (cached(), [*TEXTS[:2], "y"]),
        (cached(), TEXTS[::-1]),
        (cached(params=other_tower), TEXTS),
        (cached(dtype="bfloat16"), TEXTS),
        (cached(dataclasses.replace(config, text=other_text)), TEXTS),
    ):
        predictor.encode_text(texts)
        assert predictor.calls == 1
    assert len(list(tmp_path.iterdir())) == 6
    # Of the image tower they do not depend.
    same = cached(params=params | {"image_projection": other_tower["text_projection"]})
    same.encode_text(TEXTS)
    assert same.calls == 0


def test_a_folder_that_cannot_be_written_is_one_line(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="--cache: .*expected a folder to write to"):
        _cached(*model, tmp_path / "file" / "folder").encode_text(TEXTS)
