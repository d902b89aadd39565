"""A whole model of any origin: what the other package gives, from its files; a teacher of it resizes as torch does."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("open_clip")
import open_clip.model as library  # noqa: E402
import safetensors.torch  # noqa: E402

from grain_jax import config as config_lib  # noqa: E402
from grain_jax import inference  # noqa: E402
from grain_jax.convert import huggingface, parity, whole  # noqa: E402
from grain_jax.core import errors  # noqa: E402
from grain_jax.runtime import saved_model  # noqa: E402
from grain_jax.training import teacher as teacher_lib  # noqa: E402
from tests import foreign, perturbed, tiny  # noqa: E402

SIZE, PATCH, VOCAB, LENGTH = 32, 8, 300, 16


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    whole.describe.cache_clear()
    whole.forget()


def open_clip(folder):
    """A small CLIP of open_clip with its config, in a folder."""
    vision: Any = dict(layers=2, width=64, head_width=32, mlp_ratio=2.0, patch_size=PATCH)
    vision |= dict(image_size=SIZE)
    text: Any = dict(context_length=LENGTH, vocab_size=VOCAB, width=48, heads=3, layers=2)
    module = foreign.perturb(library.CLIP(20, vision, text, quick_gelu=False))
    config = {"model_cfg": {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(module.state_dict(), folder / "open_clip_model.safetensors")
    return module


def run_with(path, **changes):
    """(config of a run with that teacher, its batch)."""
    c = tiny.small(**changes)
    teacher = dataclasses.replace(c.teacher, kind="checkpoint", path=str(path))
    return dataclasses.replace(c, teacher=teacher), tiny.batch(c)


def teacher_of(config, batch) -> Any:
    """The teacher of a run, with the parameters that `whole.place` puts on the devices."""
    params = whole.load(config.teacher.path).params
    return teacher_lib.of_step(config, params, {}, batch)


def test_a_teacher_of_open_clip_gives_its_embeddings(tmp_path):
    module = open_clip(tmp_path)
    found = whole.load(str(tmp_path))
    images, ids = parity.inputs(SIZE, VOCAB, LENGTH, seed=1)
    with torch.no_grad():
        theirs = (
            module.encode_image(foreign.torch_images(images), normalize=True).numpy(),
            module.encode_text(torch.from_numpy(ids).long(), normalize=True).numpy(),
        )
    foreign.close_to_ours(found.model, found.params, images, ids, theirs)
    assert whole.describe(str(tmp_path)) == (found.model, 20, True, None)
    # In a run of another size: resized as torch does, then normalised.
    config, batch = run_with(tmp_path)
    assert batch.image.shape[1] == 16
    teacher = teacher_of(config, batch)
    x = torch.from_numpy(batch.image.astype(np.float32) / 255).permute(0, 3, 1, 2)
    for size in (16, 50):
        given = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
        resized = torch.nn.functional.interpolate(given, SIZE, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in zip_pixels(found.model))
        with torch.no_grad():
            theirs = module.encode_image((resized - mean) / std, normalize=True).numpy()
        image01 = jnp.asarray(given.permute(0, 2, 3, 1).numpy())
        np.testing.assert_allclose(teacher.embed(image01), theirs, atol=2e-6)
        if size == 16:
            np.testing.assert_allclose(teacher.image_embed, theirs, atol=2e-6)
    assert teacher.tokens(image01).shape == (16, 17, 64) and teacher.leading == 1
    assert float(teacher.logit_scale) == pytest.approx(module.logit_scale.exp().item())


def zip_pixels(model):
    return model.image.pixel_mean, model.image.pixel_std


def test_an_image_tower_alone_is_a_teacher_without_texts(tmp_path):
    config = transformers.DINOv3ViTConfig(image_size=SIZE, patch_size=PATCH, num_register_tokens=4)
    config.update(dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3))
    config.update(dict(intermediate_size=64))
    module = foreign.perturb(transformers.DINOv3ViTModel(config))
    module.save_pretrained(tmp_path)
    run, batch = run_with(tmp_path)
    teacher = teacher_of(run, batch)
    assert (teacher.leading, teacher.config.image.image_size) == (5, 14 * PATCH)
    image01 = np.random.default_rng(0).random((2, 112, 112, 3), np.float32)
    mean, std = (np.array(v, np.float32) for v in zip_pixels(teacher.config))
    with torch.no_grad():
        theirs = module(foreign.torch_images((image01 - mean) / std)).last_hidden_state.numpy()
    foreign.close(np.asarray(teacher.tokens(image01)), theirs)
    embed = theirs[:, 0] / np.linalg.norm(theirs[:, 0], axis=1, keepdims=True)
    foreign.close(np.asarray(teacher.embed(image01)), embed)
    with pytest.raises(errors.UserError) as error:
        print(teacher.text_embed)
    assert str(error.value) == (
        f"teacher.path: {tmp_path} cannot read the texts of the run, which a term of loss.terms compares: {tmp_path} has"
        " no text tower; expected a teacher with the run's text keys, or stored embeddings (grain-jax embed --texts)"
    )


def test_our_models_are_described_without_their_arrays(tmp_path, monkeypatch):
    model = perturbed.tiny(image__depth=1, text__depth=1, decoder=None, image__pool="class")
    params = perturbed.params(model)
    saved_model.save_model(tmp_path / "saved", model, params)
    huggingface.to_hf(tmp_path / "saved", tmp_path / "hf")
    monkeypatch.setattr(saved_model, "load_stored", None)
    for name in ("saved", "hf"):
        assert whole.describe(str(tmp_path / name)) == (model, model.embed_dim, True, None)
    assert whole.describe("aviary-tiny").embed_dim == 64
    monkeypatch.undo()
    config, batch = run_with(
        tmp_path / "hf", model__image__image_size=40, model__image__patch_size=8
    )
    teacher = teacher_of(config, batch)
    predictor = inference.Predictor(model, params)
    images = np.asarray(batch.image)
    np.testing.assert_allclose(teacher.image_embed, predictor.encode_image(images), atol=1e-6)
    assert teacher.config == config_lib.model_from_dict(dataclasses.asdict(model))


@pytest.mark.parametrize(
    ("path", "words"),
    (("nowhere", "no such file or folder, expected a checkpoint"), ("", "holds no weights")),
)
def test_no_model_is_a_line(path, words, tmp_path):
    config, _ = run_with(tmp_path / path)
    with pytest.raises(errors.UserError, match=words) as error:
        teacher_lib.describe(config)
    assert str(error.value).startswith("teacher.path: ") and "\n" not in str(error.value)
