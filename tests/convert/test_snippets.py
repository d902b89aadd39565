"""The documents' snippets run on the exports of CLIP, SigLIP and SigLIP 2 of transformers, with regions."""

import dataclasses
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import PIL.Image
import pytest
import sentencepiece

import grain_jax
from grain_jax.checkpoint import saved_model
from grain_jax.convert import export
from grain_jax.convert.__main__ import main
from grain_jax.convert.exits import tokenizers
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.input_pipeline import tokenizer
from tests import foreign, perturbed
from tests.paths import ROOT

pytestmark = pytest.mark.long

# Snippets: the page, which block, and the packages that its process must not have.
JAX = ("jax", "flax", "grain_jax", "tensorflow")
SNIPPETS = {
    "onnx": ("docs/howto/onnx.md", 0, (*JAX, "torch", "transformers", "sentencepiece")),
    "stablehlo": ("docs/library.md", 1, ("grain_jax", "flax", "torch", "transformers", "sentencepiece")),
    "to-hf": ("docs/howto/hugging_face.md", 0, JAX),
}  # fmt: skip


BIRD = PIL.Image.fromarray(np.random.default_rng(4).integers(0, 256, (60, 90, 3), np.uint8))


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2"])
def root(request, tmp_path_factory):
    """A folder with the model, with new regions, the three exports of it, and an image."""
    root = tmp_path_factory.mktemp(request.param)
    foreign.published(request.param, root)
    from_hf(root, root / "towers")
    model, params, _ = saved_model.load_model(root / "towers")
    kept = dict(image__pool="class", decoder__image_pool="tower", decoder__depth=1)
    regions = perturbed.tiny(**kept, boxes__kind="roi_align")
    model = dataclasses.replace(model, decoder=regions.decoder, boxes=regions.boxes)
    saved_model.save_model(root / "ours", model, perturbed.params(model) | params, source="test")
    for name in {model.text.tokenizer} - {"clip"}:
        shutil.copy(root / "towers" / name, root / "ours")
    exif = PIL.Image.Exif()
    exif[274] = 6  # a camera on its side: viewers turn the stored image by a quarter to the right
    BIRD.transpose(PIL.Image.Transpose.ROTATE_90).save(root / "bird.png", exif=exif)
    both = lambda output: ["--checkpoint", str(root / "ours"), "--output", str(root / output)]
    assert main(["to-onnx", *both("grain-onnx")]) == 0
    assert main(["to-hf", *both("grain-hf")]) == 0
    assert export.main(both("exported")) == 0
    return root


@pytest.mark.parametrize("export", SNIPPETS)
def test_the_snippet_gives_our_numbers(export, root):
    page, block, missing = SNIPPETS[export]
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)[block]
    before = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    names = {"onnx": "scores maps", "stablehlo": "similarity", "to-hf": "scores"}[export].split()
    after = "import numpy\nnumpy.savez('got.npz', " + ", ".join(f"{x}={x}" for x in names) + ")\n"
    subprocess.run([sys.executable, "-c", before + code + after], check=True, cwd=root, timeout=300)
    ours = grain_jax.load(root / "ours")
    texts = ["a wren", "an owl"]
    if export == "onnx":
        texts = ["a photo of a wren", "a photo of an owl"]
    embeds = ours.encode_text(texts)
    assert abs(embeds[0] - embeds[1]).max() > 0.01
    expected = (ours.encode_image([BIRD]) @ embeds.T).reshape(-1)
    with np.load(root / "got.npz") as got:
        # Cosines of unit vectors, perhaps near 0: rounding is absolute.
        np.testing.assert_allclose(got[names[0]].reshape(-1), expected, atol=2e-6)
        if "maps" in names:
            np.testing.assert_allclose(got["maps"][0], ours.similarity_map(BIRD, texts), atol=2e-6)


def test_every_tokenizer_is_the_models(root):
    import tokenizers as library

    ours = grain_jax.load(root / "ours").tokenizer
    for folder in ("grain-onnx", "exported"):
        file = library.Tokenizer.from_file(str(root / folder / "tokenizer.json"))
        ids = [x.ids for x in file.encode_batch(tokenizers.TEXTS)]
        np.testing.assert_array_equal(ids, ours(tokenizers.TEXTS))


GEMMA: Any = dict(
    model_type="bpe",
    byte_fallback=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    user_defined_symbols=["\u2581\u2581", "\n"],
)
TEXTS = [
    *("a photo of a wren", "  Two DOGS and\ta cat's bowl, 1998! ", ""),
    "caf\u00e9 \uff26\uff55ll _a_\n\nb",
]


@pytest.mark.parametrize("cleaning", ["canonical", "siglip", "siglip2", "none"])
@pytest.mark.parametrize("options", [{}, GEMMA], ids=["unigram", "gemma"])
def test_sentencepiece_as_a_json_file_has_the_librarys_ids(options, cleaning, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "two dogs and a cat", "x"] * 9),
        model_prefix=f"{tmp_path}/siglip",
        minloglevel=2,
        hard_vocab_limit=False,
        **dict(vocab_size=350, bos_id=-1, unk_id=2, eos_id=1, pad_id=0) | options,
    )
    text = dict(text__tokenizer="siglip.model", text__cleaning=cleaning, text__vocab_size=400)
    tower = perturbed.tiny(**text).text
    files, missing = tokenizers.files(tower, tmp_path, fast=True)
    assert not missing and "tokenizer.json" in files
    ids = [x.ids for x in tokenizers.complete(files, tower).encode_batch(TEXTS)]
    np.testing.assert_array_equal(ids, tokenizer.of_tower(tower, tmp_path)(TEXTS, 32))
