import numpy as np
import pytest

from grain_jax.core import errors
from grain_jax.evaluate import encode
from tests.evaluate.stub import StubPredictor, write_picture


def test_pictures_come_in_order_and_the_unreadable_are_named(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i in (0, 1, 3, 4, 6):
        write_picture(paths[i], i, size=(10 + i, 5))
    paths[2].write_bytes(b"no picture")  # paths[5] does not exist
    predictor = StubPredictor(images={i: [i, 1.0] for i in range(7)})
    unreadable = {}
    given = dict(label="", regions=False, batch_size=3)
    batches = list(encode.encode_images(predictor, paths, unreadable=unreadable, **given))
    assert [b.index.tolist() for b in batches] == [[0, 1, 3], [4, 6]]
    sizes = np.concatenate([b.sizes for b in batches]).tolist()
    assert sizes == [[10, 5], [11, 5], [13, 5], [14, 5], [16, 5]]
    assert np.concatenate([b.image_embed for b in batches])[:, 0].tolist() == [0, 1, 3, 4, 6]
    assert set(unreadable) == {str(paths[2]), str(paths[5])}
    whole = encode.gather_images(predictor, paths, unreadable={}, **given)
    assert whole.index.tolist() == [0, 1, 3, 4, 6] and whole.sizes.tolist() == sizes
    assert whole.image_embed.tolist() == [[i, 1] for i in (0, 1, 3, 4, 6)]
    assert whole.labels.tolist() == [-1] * 5 and whole.regions is None
    report = encode.report_unreadable(unreadable)
    assert report["unreadable"] == 2
    for name, reason in zip(("2.png", "5.png"), report["unreadable_pictures"], strict=True):
        assert name in reason
    with pytest.raises(errors.UserError, match="none of 1 images can be read.*2.png"):
        list(encode.encode_images(predictor, paths[2:3], label="", unreadable={}))


def test_not_finite_embeddings_are_an_error(tmp_path):
    write_picture(tmp_path / "0.png", 0)
    predictor = StubPredictor(images={0: [np.nan, 1.0]})
    given = dict(label="", unreadable={}, regions=False)
    with pytest.raises(errors.UserError, match="not finite"):
        list(encode.encode_images(predictor, [tmp_path / "0.png"], **given))


def test_each_text_is_encoded_once():
    predictor = StubPredictor(texts={"a": [1, 0], "b": [0, 1], "c": [1, 1]})
    embeds = encode.encode_texts(predictor, [["a", "b"], ["b", "c", "a"]])
    assert predictor.asked == ["a", "b", "c"]
    assert embeds[1].tolist() == [[0, 1], [1, 1], [1, 0]]
