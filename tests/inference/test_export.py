import contextlib
import io
import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax import export as jax_export

from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.convert import export
from tests import perturbed

# As docs/library.md shows it; nothing of ours can be imported there, nor flax.
ALONE = """
import sys
from typing import Any
sys.modules["grain_jax"] = sys.modules["flax"] = None
import jax, numpy as np
from jax import export

folder = sys.argv[1]
params = jax.device_put(dict(np.load(f"{folder}/params.npz")))
read = lambda name: export.deserialize(open(f"{folder}/{name}.stablehlo", "rb").read())
image, text, regions = (jax.jit(read(name).call) for name in ("image", "text", "regions"))
given = dict(np.load(sys.argv[2]))
out = {}
for n in (1, 5):
    for name, x in regions(params, given["pictures"][:n]).items():
        out[f"{n}/{name}"] = x
    tokens = given["tokens"][:n, :8 * n]
    out[f"{n}/text_embed"] = text(params, tokens, tokens.argmax(1).astype(np.int32))["text_embed"]
out["alone"] = image(params, given["pictures"])["image_embed"]
np.savez(sys.argv[3], **out)
"""


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-6)


@pytest.fixture(scope="module", params=perturbed.REGIONS)
def predictor(request):
    model = perturbed.tiny(image__depth=1, text__depth=1, **perturbed.REGIONS[request.param])
    return inference.Predictor(model, perturbed.params(model))


@pytest.fixture(scope="module")
def folder(predictor, tmp_path_factory):
    """The folder that the command writes."""
    folder = tmp_path_factory.mktemp("export")
    saved_model.save_model(folder / "model", predictor.model, predictor.params, source="test")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert export.main(["--checkpoint", f"{folder}/model", "--output", f"{folder}/out"]) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder / "out"


def test_it_runs_without_grain_jax_and_gives_the_same(predictor, folder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 40, 40, 3)).astype(np.uint8)
    tokens = np.zeros((5, 32), np.int32)
    for row, end in zip(tokens, (7, 3, 5, 2, 4)):
        row[: end + 1] = [298, *rng.integers(1, 298, end - 1), 299]
    np.savez(tmp_path / "given.npz", pictures=pictures, tokens=tokens)
    command = [sys.executable, "-c", ALONE, folder, tmp_path / "given.npz", tmp_path / "got.npz"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, timeout=300)
    got = np.load(tmp_path / "got.npz")
    image, regions = predictor.encode_image_and_regions(pictures)
    text = predictor.encode_text(tokens)
    assert np.abs(text[0] - text[1]).max() > 0.01
    close(got["alone"], image)
    for n in (1, 5):
        close(got[f"{n}/image_embed"], image[:n])
        close(got[f"{n}/region_embed"], regions.embed[:n])
        close(got[f"{n}/boxes_xyxy"], regions.boxes_xyxy[:n])
        close(got[f"{n}/text_embed"], text[:n])
    assert ("5/region_prior" in got) == predictor.has_proposals == regions.prior.any()
    prior = got.get("5/region_prior", np.zeros((5, 3), np.float32))
    close(prior, regions.prior)
    with monkeypatch.context() as patch:  # no tokenizer has so few words
        patch.setattr(predictor, "encode_text", lambda names: text)
        expected = predictor.detect(pictures, [f"text {i}" for i in range(5)], top_k=12)
    boxes_xyxy, embed = got["5/boxes_xyxy"], got["5/region_embed"]
    perturbed.same_detections(predictor, expected, boxes_xyxy, embed, prior, got["5/text_embed"])
    for key in got:
        if key.startswith("1/"):
            np.testing.assert_allclose(got[key], got[f"5/{key[2:]}"][:1], rtol=1e-5, atol=3e-6)


def test_the_description(folder):
    for name in ("image", "text", "regions", "boxes", "maps"):  # one file serves every platform
        exported = jax_export.deserialize((folder / f"{name}.stablehlo").read_bytes())
        assert exported.platforms == ("cpu", "cuda", "tpu") and exported.nr_devices == 1
    said = json.loads((folder / "model.json").read_text())
    assert said["platforms"] == ["cpu", "cuda", "tpu"] and said["jax"] == jax.__version__
    assert said["functions"]["boxes"] == ["params", "image", "boxes_xyxy"]
    assert said["image"]["size"] == 40 and said["image"]["pixel_mean"] == [0.485, 0.456, 0.406]
    assert said["text"]["context_length"] == 32 and said["text"]["vocab_size"] == 300
    assert said["text"]["tokenizer"].startswith("no tokenizer files: a vocabulary of 300")
    assert said["logit_scale"] == pytest.approx(np.exp(2.5))


def test_two_towers_that_see_their_padding(tmp_path):
    """Whole rows, no regions, all options of the image tower; the tokenizer comes, an older export goes."""
    text = dict(causal=False, pool="last", pad_id=1, tokenizer="tokenizer.json", depth=1)
    image = dict(registers=2, layer_scale=True, mlp="gated", key_bias=False, depth=1)
    image |= dict(rope="centres", positions=False, pool="map")
    changes = {f"text__{key}": value for key, value in text.items()}
    changes |= {f"image__{key}": value for key, value in image.items()}
    model = perturbed.tiny(decoder=None, **changes)
    (tmp_path / "model").mkdir()
    perturbed.write_words(tmp_path / "model", "unknown pad wren")
    for name in ("out/regions.stablehlo", "out/model.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    options: Any = dict(folder=tmp_path / "model", dtype="bfloat16")
    predictor = inference.Predictor(model, perturbed.params(model), **options)
    compared = export.export_model(predictor, tmp_path / "out", platforms=["cpu"])
    names = ["image: image_embed", "text: text_embed", "maps: similarity_map"]
    assert {c.name: c.ok for c in compared} == dict.fromkeys(names, True)
    files = {"image.stablehlo", "text.stablehlo", "maps.stablehlo", "params.npz", "model.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files | {"tokenizer.json"}
    said = json.loads((tmp_path / "out" / "model.json").read_text())
    text = jax_export.deserialize((tmp_path / "out/text.stablehlo").read_bytes())
    assert text.in_avals[-2].shape[1] == 32
    assert said["text"]["tokenizer"].startswith("tokenizer.json, which cleans, cuts and pads")
    assert said["activations"] == "bfloat16"
