import numpy as np
import pytest

from grain_jax.core import errors
from grain_jax.evaluate import encode
from grain_jax.runtime import processes
from tests.evaluate.stub import StubPredictor, write_picture


def test_pictures_come_in_order_and_the_unreadable_are_named(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i in (0, 1, 3, 4, 6):
        write_picture(paths[i], i, size=(10 + i, 5))
    paths[2].write_bytes(b"no picture")  # paths[5] does not exist
    predictor = StubPredictor(images={i: [i, 1.0] for i in range(7)})
    batches, options = [], dict(label="", batch_size=3)
    seen = lambda batch: batches.append(batch.index.tolist()) or {"index": batch.index}
    arrays, unreadable = encode.over_images(paths, encode.resizing(predictor), seen, **options)
    assert batches == [[0, 1, 3], [4, 6]] and arrays["index"].tolist() == [0, 1, 3, 4, 6]
    assert set(unreadable) == {str(paths[2]), str(paths[5])}
    whole = encode.gather_images(predictor, paths, **options)
    assert whole.index.tolist() == [0, 1, 3, 4, 6]
    assert whole.sizes.tolist() == [[10, 5], [11, 5], [13, 5], [14, 5], [16, 5]]
    assert whole.image_embed.tolist() == [[i, 1] for i in (0, 1, 3, 4, 6)]
    assert whole.labels.tolist() == [-1] * 5 and whole.regions.embed.shape == (5, 0, 2)
    report = encode.report_unreadable(whole.unreadable)
    assert report["unreadable"] == 2
    for name, reason in zip(("2.png", "5.png"), report["unreadable_images"], strict=True):
        assert name in reason
    with pytest.raises(errors.UserError, match="none of 1 images can be read.*2.png"):
        encode.gather_images(predictor, paths[2:3], label="")


def test_not_finite_embeddings_are_an_error_of_which_other_processes_learn(tmp_path, monkeypatch):
    write_picture(tmp_path / "0.png", 0)
    predictor, messages, agree = StubPredictor(images={0: [np.nan, 1.0]}), [], processes.agree
    record = lambda *result: messages.append(result[0]) or agree(*result)
    monkeypatch.setattr(processes, "agree", record)
    with pytest.raises(errors.UserError, match="not finite") as error:
        encode.gather_images(predictor, [tmp_path / "0.png"], label="")
    assert messages[-1] is error.value
