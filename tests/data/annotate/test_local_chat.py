"""A chat model on this machine: batches and their padding, ends and limits, what does not fit, what fails."""

import shutil

import pytest
import torch

from grain_jax.core import errors
from grain_jax.data.annotate import chat, local_models
from grain_jax.data.annotate.arguments import Annotate
from tests import record_sets
from tests.data.annotate import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.llava_next(tmp_path_factory.mktemp("llava"))


def load(folder, **args):
    return local_models.LocalChat(Annotate(images="", output="", chat=str(folder), **args))


def test_a_batch_gives_what_each_picture_gives_alone(folder, caplog, monkeypatch):
    monkeypatch.setattr(chat, "MAX_TOKENS", 12)
    sizes = [(60, 30), (30, 90), (28, 28), (200, 20), (57, 33)]
    pictures = [record_sets.picture(10 * i, size) for i, size in enumerate(sizes)]
    prompts = ["a", "what is in this image? " * 4, "list", "list", "say a few words"]
    alone, together = load(folder, batch_size=1), load(folder, batch_size=5)
    expected = alone.answer(pictures, prompts)
    assert together.answer(pictures, prompts) == expected
    assert not caplog.records  # the batch did not fall apart
    assert len({answer.text for answer in expected}) == 5
    # The answers are to these images and these prompts; the mark of an image in a prompt is none.
    assert alone.answer(pictures[1:2], prompts[:1])[0].text != expected[0].text
    assert alone.answer(pictures[:1], prompts[1:2])[0].text != expected[0].text
    assert alone.answer(pictures[:1], ["<image>a<image>"])[0] == expected[0]
    assert all(answer.cut_off for answer in expected)  # noise has no end
    before, letter, _ = expected[0].text.partition(next(x for x in expected[0].text if "!" <= x <= "~"))
    end = alone._processor.tokenizer.convert_tokens_to_ids(letter)
    alone._model.generation_config.eos_token_id = end
    assert alone.answer(pictures[:1], prompts[:1]) == [chat.Answer(before + letter, cut_off=False)]


def test_a_batch_that_fails_is_halved_down_to_the_item_that_the_model_cannot_take():
    sizes = []

    def model(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if 6 in batch:
            raise ValueError("cannot\ntake this")
        if 5 in batch:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [2 * item for item in batch]

    memory = chat.Failure("out of memory", "OutOfMemoryError: CUDA out of memory.")
    failure = chat.Failure("model error", "ValueError: cannot take this")
    results = local_models.in_batches(model, range(7), 6)
    assert results == [0, 2, 4, 6, 8, memory, failure] and sizes == [6, 3, 2, 1, 3, 2, 1, 1]


def test_models_that_cannot_be_used(tmp_path, folder):
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    for name, line in (
        (tmp_path / "nothing-here", "nothing-here: cannot be loaded"),
        (plain, "no chat template"),
    ):
        with pytest.raises(errors.UserError, match=line):
            load(name)
