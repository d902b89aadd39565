"""Models of images in their own shape against the classes of transformers, open_clip and timm that take them."""

import json
from typing import Any

import jax
import numpy as np
import open_clip
import pytest
import torch
import transformers
from timm.models import _registry, naflexvit

import grain_jax
from grain_jax.convert import export, huggingface, towers
from grain_jax.convert.__main__ import main
from grain_jax.convert.faults import ConvertError
from grain_jax.convert.huggingface import from_hf
from grain_jax.convert.open_clip.command import from_open_clip
from grain_jax.convert.reference import module as torch_module
from grain_jax.convert.reference import names
from grain_jax.core import patches, schema
from grain_jax.inference import jitted
from grain_jax.models import places, vit
from grain_jax.runtime import checkpoint
from tests import foreign, perturbed
from tests.convert.test_exits import SIGLIP, run

torch.set_num_threads(1)
NONE = towers.Settings()
PATCH = 8
RATIOS = ((40, 40), (30, 60), (64, 32), (25, 100), (90, 30))  # height and width, 1:1 to 1:4 and 3:1


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (*sides, 3), np.uint8) for sides in RATIOS]


def shaped(length: int) -> schema.Patches:
    return patches.stack([patches.of_image(image, PATCH, length) for image in images()])


def ours(folder, given: schema.Patches) -> np.ndarray:
    stored = checkpoint.load_stored(folder)
    return np.asarray(jitted.image_program(stored.model, "float32")(stored.params, given)[0])


def siglip2(**vision: Any) -> Any:
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=24, intermediate_size=40)
    ids = dict(vocab_size=50, bos_token_id=48, eos_token_id=49, pad_token_id=0)
    text = sizes | ids | dict(max_position_embeddings=8)
    image = sizes | dict(patch_size=PATCH, num_patches=16) | vision
    config = transformers.Siglip2Config(text_config=text, vision_config=image)
    return foreign.perturb(transformers.Siglip2Model(config))


def test_siglip2_comes_in_with_its_shapes(tmp_path):
    """Three lengths, five ratios, from the pixels on."""
    module = siglip2()
    module.save_pretrained(tmp_path / "theirs")
    processor = transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=20)
    processor.save_pretrained(tmp_path / "theirs")
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert report.verdict == "PROVEN" and "\nimage_embed, shapes " in report.text, report.text
    assert "own shape: at most 20 patches" in report.text
    assert checkpoint.load_stored(tmp_path / "ours").sequence_lengths == (20,)
    pil = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    embeddings = module.vision_model.embeddings
    table = embeddings.position_embedding.weight.detach()
    for length in (9, 20, 30):
        given = pil(images(), return_tensors="pt", max_num_patches=length)
        with torch.no_grad():
            theirs = module.vision_model(**given).pooler_output.numpy()
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
        found = shaped(length)
        assert found.grid.tolist() == given["spatial_shapes"].tolist()
        foreign.close(ours(tmp_path / "ours", found), theirs)
        square = table.reshape(4, 4, -1)
        positions = embeddings.resize_positional_embeddings(square, given["spatial_shapes"], length)
        at = places.of_grid(found.grid, length)
        own, real = (np.asarray(x) for x in (vit.positions_at(table.numpy(), at), at.mask))
        foreign.close(own[real], positions.numpy()[real])


@pytest.fixture
def naflex(monkeypatch):
    """A NaFlex model of timm as small as ours, by a name of its own; open_clip takes trunks by name alone."""

    def naflexvit_tiny_patch8_siglip(pretrained=False, **options):
        cfg = naflexvit.NaFlexVitCfg(
            patch_size=PATCH,
            embed_dim=128,
            depth=1,
            num_heads=2,
            mlp_ratio=1.5,
            act_layer="gelu_tanh",
            global_pool="map",
            pos_embed_grid_size=(4, 4),
            pos_embed_interp_mode="bilinear",
        )
        model: Any = naflexvit.NaFlexVit(cfg, num_classes=options.get("num_classes", 0))
        model.default_cfg = {}  # what open_clip asks of a registered model
        return model

    name = naflexvit_tiny_patch8_siglip.__name__
    monkeypatch.setitem(_registry._model_entrypoints, name, naflexvit_tiny_patch8_siglip)
    monkeypatch.setitem(_registry._model_to_module, name, "naflexvit")
    return name


def test_naflex_of_open_clip_comes_in(naflex, tmp_path):
    vision: Any = dict(timm_model_name=naflex, timm_pool="map", timm_proj="none", image_size=64)
    text: Any = dict(context_length=8, vocab_size=50, width=24, heads=2, layers=1, proj_bias=True)
    text |= dict(no_causal_mask=True, pool_type="last", norm_kwargs=dict(eps=1e-6))
    text |= dict(act_kwargs=dict(approximate="tanh"))
    module = foreign.perturb(open_clip.CustomTextCLIP(128, vision, text, init_logit_bias=-3.0))
    source = tmp_path / "theirs"
    source.mkdir()
    torch.save(module.state_dict(), source / "m.pt")
    # Of open_clip 4, which prepares so many patches.
    stated = dict(embed_dim=128, vision_cfg=vision | dict(image_seq_len=18), text_cfg=text)
    (source / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=stated)))
    report = from_open_clip(source / "m.pt", tmp_path / "ours", NONE)
    assert report.verdict == "PROVEN" and "\nimage_embed, shapes " in report.text, report.text
    stored = checkpoint.load_stored(tmp_path / "ours")
    assert stored.sequence_lengths == (18,) and stored.model.image.activation == "gelu_tanh"
    found = shaped(18)
    rows, columns = (np.array(x)[:, None] for x in zip(*found.grid))
    at = np.arange(18)
    yx = np.stack(np.divmod(at, columns), axis=-1) * (at < rows * columns)[..., None]
    pixels = (found.pixels / 255 - 0.5) / 0.5
    given = dict(patches=pixels.astype(np.float32), patch_coord=yx, patch_valid=at < rows * columns)
    with torch.no_grad():
        theirs = module.encode_image(jax.tree.map(torch.tensor, given), normalize=True)
    foreign.close(ours(tmp_path / "ours", found), theirs.numpy())

    (source / "open_clip_config.json").unlink()
    again = from_open_clip(source / "m.pt", tmp_path / "again", towers.Settings(heads={"text": 2}))
    assert "own shape: at most 16 patches" in again.text, again.text
    assert "ASSUMED  image: activation gelu_tanh" in again.text
    for change, line in (
        (
            dict(timm_model_name="naflexvit_base_patch16_gap"),
            "vision_cfg.timm_model_name: got naflexvit_base_patch16_gap, expected naflexvit_\\*_sig",
        ),
        (
            dict(timm_model_kwargs=dict(reg_tokens=2)),
            "vision_cfg.timm_model_kwargs: got reg_tokens, expected none with naflexvit_tiny",
        ),
        (
            dict(image_seq_len=2**20),
            "vision_cfg.image_seq_len: got 1048576, expected a number of patches of an image",
        ),
    ):
        wrong = dict(model_cfg=stated | dict(vision_cfg=vision | change))
        (source / "open_clip_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ConvertError, match=line):
            from_open_clip(source / "m.pt", tmp_path / "wrong", NONE)


def made(folder, **changes: Any):
    """A saved model, of two lengths; with a decoder it has a text decoder, too."""
    model = perturbed.tiny(**changes)
    decoder = perturbed.decoder(model, depth=1) if model.decoder is not None else None
    checkpoint.save_model(folder, model, perturbed.params(model), decoder, (12, 24))
    perturbed.write_words(folder, "unknown pad a photo of wren two dogs and cat s bowl long x")
    return folder


def card_of(folder) -> dict[str, Any]:
    """The names that the code of a model card gives, on `images`."""
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(folder))
    found: dict[str, Any] = {"pictures": images()}
    exec(
        code.replace("ImageOps.exif_transpose", "").replace(
            'Image.open("bird.jpg")', "list(map(Image.fromarray, pictures))"
        ),
        found,
    )
    return found


def test_two_towers_go_out_as_siglip2(tmp_path, capsys):
    source = made(tmp_path / "ours", **SIGLIP, text__projection="affine")
    printed = run(capsys, "to-hf", source, tmp_path / "hf")
    assert "Siglip2Model\n" in printed and "24 patches at most; trained with 12 or 24" in printed
    for name in ("pixels", "grid", "token_ids", "encode_text", "logits"):
        assert f"\n{name} " in printed
    given = card_of(tmp_path / "hf")
    stored = checkpoint.load_stored(source)
    text = jitted.text_program(stored.model, "float32")
    row = np.zeros((1, stored.model.text.context_length), np.int32)
    row[0, :5] = 2, 3, 4, 2, 5  # a photo of a wren
    embed = np.asarray(text(stored.params, row, np.zeros(1, np.int32)))
    scores = np.exp(stored.params["logit_scale"]) * ours(source, shaped(24)) @ embed.T
    foreign.close(scores + stored.params["logit_bias"], given["scores"].numpy())

    printed = run(capsys, "to-hf", source, tmp_path / "vision", "--part", "vision")
    assert "Siglip2VisionModel\n" in printed and "\ntokens " in printed
    run(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert checkpoint.load_stored(tmp_path / "back").sequence_lengths == (24,)
    for command in ("to-onnx", "to-open-clip", "to-big-vision", "to-torch"):
        output = tmp_path / "out.npz"
        assert main([command, "--input", str(source), "--output", str(output)]) == 2
        said = capsys.readouterr().err
        line = f"input.sequence_lengths: got (12, 24), {command} writes models of square images"
        assert line in said.splitlines() and "convert to-hf, " in said and not output.exists()


def test_lengths_that_are_none_are_refused(tmp_path):
    source = made(tmp_path / "ours", **SIGLIP)
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | dict(sequence_lengths=[0])))
    with pytest.raises(checkpoint.CheckpointError, match=r"got \(0,\), expected different numbers"):
        checkpoint.load_stored(source)


def test_grain_in_its_own_shapes(tmp_path, capsys, monkeypatch):
    """With regions, boxes and a text decoder: transformers, back, and StableHLO."""
    source = made(
        tmp_path / "ours",
        image__depth=1,
        text__depth=1,
        image__registers=2,
        text__causal=False,
        text__pool="last",
        boxes__kind="roi_align",
        text__tokenizer="tokenizer.json",
    )
    printed = run(capsys, "to-hf", source, tmp_path / "hf")
    for name in ("pixels", "grid", "region_embed", "boxes_xyxy", "box_embed", "text_decoder"):
        assert f"\n{name} " in printed
    by_card = card_of(tmp_path / "hf")
    module, processor = by_card["model"], by_card["processor"]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "`describe(pixels, boxes, spatial_shapes=shapes)`" in card and "maps" not in card
    assert processor(images=images(), max_num_patches=9)["pixel_values"].shape[1] == 9
    given = processor(images=images(), text=["a photo"])
    predictor = grain_jax.load(tmp_path / "hf")
    assert predictor.sequence_length == 24
    with torch.no_grad():
        found = module(**given)
        written = module.caption(given["pixel_values"], spatial_shapes=given["spatial_shapes"])
        image, regions = predictor.encode_image_and_regions(images())
        foreign.close(image, found.image_embeds.numpy())
        foreign.close(regions.embed, found.region_embeds.numpy())
        foreign.close(regions.embed, by_card["regions"].embeds.numpy())
        for i, shape in enumerate(given["spatial_shapes"]):  # of each image alone, without padding
            alone = given["pixel_values"][i, : shape.prod()][None]
            caption = module.caption(alone, spatial_shapes=shape[None])[0].numpy()
            assert (caption == written[i, : len(caption)].numpy()).all()
    with pytest.raises(ValueError, match="spatial_shapes: got grids of more than the 24 patches"):
        module.get_image_features(given["pixel_values"], torch.full((5, 2), 6))
    run(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert checkpoint.load_stored(tmp_path / "back").sequence_lengths == (12, 24)
    monkeypatch.setattr(export, "TASKS", ("caption",))
    compared = export.export_model(grain_jax.load(source), tmp_path / "hlo", ["cpu"])
    assert all(c.ok for c in compared)
    found = {c.name.partition(":")[0] for c in compared}
    assert found == {"image", "text", "regions", "boxes", "caption"}
    stated = json.loads((tmp_path / "hlo" / "model.json").read_text())
    assert stated["functions"]["image"]["inputs"]["grid"] == "int32[b, 2]"
    assert stated["image"]["sequence_length"] == 24


OWN = dict(image__depth=1, text__depth=1, decoder=None)


@pytest.mark.parametrize(
    "changes",
    [
        OWN | dict(image__pool="mean", image__rope="centres", boxes__kind="prompter"),
        OWN | dict(image__pool="map", image__rope="grid", image__rope_grid=3),
    ],
    ids=["mean, centres, prompter", "map, grid"],
)
def test_the_torch_module_in_own_shapes(changes):
    model = perturbed.tiny(**changes)
    params = perturbed.params(model)
    report = torch_module.prove(model, params, names.state_dicts(params), None, (24,))
    assert report.verdict == "PROVEN" and "5 images" in report.text, report.text


def test_squares_keep_their_files():
    plain, shaped_too = (huggingface.code_of(perturbed.tiny(), has_shapes=x) for x in (False, True))
    assert "Places" in shaped_too["modeling_grain.py"]
    assert not any("Places" in text or "shapes>" in text for text in plain.values())
