import jax
import numpy as np
import pytest
import torch

from benchmarks.parity import comparison
from benchmarks.parity import goldens as goldens_parity
from grain_jax import losses
from grain_jax.checkpoint import saved_model
from grain_jax.convert import huggingface, parity
from grain_jax.convert.__main__ import main
from grain_jax.convert.reference import commands as files
from grain_jax.convert.reference import module as torch_module
from grain_jax.convert.reference import names
from tests import perturbed

torch.set_num_threads(1)  # small matrices; threads would only wait for each other


@pytest.fixture(scope="module")
def golden():
    return goldens_parity.goldens()


def golden_states(golden):
    parts = ("backbone", "decoder")
    return {part: goldens_parity.below(golden.arrays, f"params/{part}/") for part in parts}


@pytest.fixture(scope="module")
def golden_losses():
    c = goldens_parity.config().loss
    return {name: getattr(c, name, 1e-4) for name in huggingface.LOSSES}  # the IoU's epsilon


@pytest.fixture(scope="module")
def module(golden, golden_losses):
    made = torch_module.make_module(golden.model, golden_losses)
    torch_module.load_states(made, golden_states(golden))
    return made


def test_golden_to_jax_and_back_is_identical(golden, tmp_path, capsys):
    saved_model.save_model(tmp_path / "model", golden.model, golden.params)
    path = tmp_path / "x.pth.tar"
    assert main(["to-torch", "--input", str(tmp_path / "model"), "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("parity: PROVEN") and "class_embed.weight" in printed
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {
        *("epoch", "iteration", "best_acc", "optimizer"),
        *("state_dict", "backbone_state_dict"),
    }
    assert all(name.startswith("module.") for name in stored["state_dict"])
    written, original = files.read(path), golden_states(golden)
    for which, state in original.items():
        assert written[which].keys() == state.keys()  # the reference loads strictly
        for name, array in state.items():
            if name in names.UNUSED[which]:
                assert not written[which][name].any()
            else:
                np.testing.assert_array_equal(written[which][name], array)
                assert written[which][name].shape == array.shape
    assert written["decoder"]["class_embed.weight"].shape == (22048, 64)
    assert written["decoder"]["pos_embed"].shape == (1, 513, 64)
    assert written["backbone"]["image_projection"].shape == (48, 512)


def test_the_torch_module_gives_the_references_outputs(golden, module):
    a = golden.arrays
    with torch.no_grad():
        tokens = module.backbone.visual(torch.tensor(a["inputs/images"]))
        image, regions, boxes = module.decoder(tokens)
        text = module.get_text_features(torch.tensor(a["inputs/text"]).long())
    for ours, name in (
        (tokens, "vision_tokens"),
        (image, "img_embed"),
        (regions, "obj_embeds"),
        (boxes[-1], "pred_boxes"),
        (boxes[0], "aux/0/pred_boxes"),
        (text, "text_embed"),
    ):
        assert comparison.relative(name, ours.numpy(), a[f"outputs/{name}"]).ok, name


def golden_inputs(golden):
    a = golden.arrays
    corners = torch.tensor(a["inputs/boxes"]).clamp(0, 224) / 224
    low, high = corners[..., :2], corners[..., 2:]
    return dict(
        pixel_values=torch.tensor(a["inputs/images"]),
        input_ids=torch.tensor(a["inputs/text"]).long(),
        description_ids=torch.tensor(a["inputs/desc"]).long(),
        region_boxes_cxcywh=torch.cat([(low + high) / 2, high - low], dim=-1),
        region_mask=torch.tensor(a["inputs/avail"]) == 1,
    )


def test_the_torch_modules_loss_and_gradients_are_the_references(golden, module):
    module.zero_grad()
    out = module(**golden_inputs(golden), return_loss=True)
    for name, ours in (
        ("clip_loss", out.losses["image_caption"]),
        ("box_loss", 1.5 * out.losses["box"]),
        ("word_loss", out.losses["region_description"]),
        ("total", out.loss),
    ):
        reference_loss = golden.arrays[f"losses/{name}"]
        assert comparison.relative(name, ours.detach().numpy(), reference_loss).ok, name
    out.loss.backward()
    compared = 0
    for name, parameter in module.named_parameters():
        stored = golden.arrays["grads/" + name.replace(".", "/", 1)]
        assert comparison.gradient(name, parameter.grad.numpy(), stored).ok, name
        compared += 1
    assert compared == sum(key.startswith("grads/") for key in golden.arrays)


@pytest.mark.parametrize(
    "switches",
    [
        dict(mask_duplicates=True, deep_supervision=True, match_description=3.0),
        dict(contrast="sigmoid", mask_duplicates=True),
    ],
)
def test_the_torch_modules_loss_is_ours_with_every_switch(golden, module, golden_losses, switches):
    """Captions 0 and 1 are the same text, and so are the first descriptions of images 0 and 2."""
    inputs = golden_inputs(golden)
    inputs["input_ids"][1] = inputs["input_ids"][0]
    inputs["description_ids"][2, 0] = inputs["description_ids"][0, 0]
    ours_alone = {"iou_epsilon": 0.0, "image_caption": 0.5}
    module.config.losses = golden_losses | ours_alone | switches
    try:
        with torch.no_grad():
            out = module(**inputs, return_loss=True)
    finally:
        module.config.losses = golden_losses

    ours = goldens_parity.outputs()["outputs"]
    batch = goldens_parity.batch(golden.arrays["inputs/boxes"], packed=False)
    text, described = ours.text_embed.copy(), ours.region_text_embed.copy()
    text[1], described[2, 0] = text[0], described[0, 0]
    same_caption, same_description = batch.caption_id.copy(), batch.description_id.copy()
    same_caption[1], same_description[2, 0] = same_caption[0], same_description[0, 0]
    batch = batch._replace(caption_id=same_caption, description_id=same_description)
    ours = ours._replace(text_embed=text, region_text_embed=described)
    c = goldens_parity.config().loss
    c = c.__class__(**(vars(c) | switches | {"image_caption": 0.5}))
    expected = jax.jit(lambda *given: losses.total_loss(*given, c))(ours, batch)
    for name, value in out.losses.items():
        np.testing.assert_allclose(value, expected.terms[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(out.loss, expected.total, rtol=1e-5)


def test_under_autocast_similarities_are_float32(golden, module):
    inputs = golden_inputs(golden)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = module(**inputs, return_loss=True)
        cosines = out.image_embeds.double() @ out.text_embeds.double().T
    logits = module.backbone.logit_scale.exp().double() * cosines
    np.testing.assert_allclose(out.logits_per_image.detach(), logits.detach(), atol=1e-5)
    labels = torch.arange(len(logits))
    cross = torch.nn.functional.cross_entropy
    expected = (cross(logits, labels) + cross(logits.T, labels)) / 2
    np.testing.assert_allclose(out.losses["image_caption"], expected.detach(), rtol=1e-5)


def test_a_batch_without_regions_has_no_region_losses(golden, module):
    inputs = golden_inputs(golden)
    inputs["region_mask"] = torch.zeros_like(inputs["region_mask"])
    with torch.no_grad():
        out = module(**inputs, return_loss=True)
    assert out.losses["box"] == out.losses["region_description"] == 0
    assert torch.isfinite(out.loss)


def test_a_parameter_that_the_table_lacks_is_not_lost():
    model = perturbed.tiny()
    params = perturbed.params(model) | {"adapter": {"bias": np.zeros(3, np.float32)}}
    with pytest.raises(ValueError, match="without a name in torch: adapter/bias"):
        names.state_dicts(params)


def test_every_parameter_counts():
    """An output has a gradient for each tensor of the perturbed model: parity would notice a change."""
    model = perturbed.tiny()
    module = torch_module.make_module(model)
    torch_module.load_states(module, names.state_dicts(perturbed.params(model)))
    arrays = parity.inputs(40, 300, 32)
    pixels = torch.tensor(arrays.images).permute(0, 3, 1, 2)
    out = module(pixels, torch.tensor(arrays.token_ids).long())
    generator = torch.Generator().manual_seed(0)
    draw = lambda x: torch.randn(x.shape, generator=generator)
    embeds = (out.image_embeds, out.text_embeds, out.region_embeds, out.boxes_xyxy)
    (sum((x * draw(x)).sum() for x in embeds) + out.logits_per_image.sum()).backward()
    # Mathematically without effect: what shifts all logits of a softmax alike, and the first layer's
    # normalised zeros (quirk 14).
    blind = ("k_norm.bias", "layers.0.norm1.weight", "layers.0.self_attn.in_proj")
    for name, parameter in module.named_parameters():
        if not any(part in name for part in blind):
            assert parameter.grad.abs().max() > 1e-5, name


def test_what_the_references_format_cannot_hold_is_a_line_each(tmp_path, capsys):
    other = dict(image__pre_norm=True, text__activation="gelu", logit_bias_init=-10.0)
    model = perturbed.tiny(decoder__image_pool="all", **other)
    saved_model.save_model(tmp_path / "model", model, perturbed.params(model))
    out = tmp_path / "x.pth.tar"
    for source, target, expected_words in (
        ("model", out, ["logit_bias_init: got -10.0", "image.pre_norm: got True",
                        "text.activation: got gelu", "decoder.image_pool: got all"]),
        ("model", tmp_path, [f"{tmp_path}: is a folder"]),
        ("nowhere", out, ["nowhere: no such folder"]),
    ):  # fmt: skip
        arguments = ["--input", str(tmp_path / source), "--output", str(target)]
        assert main(["to-torch", *arguments]) == 2 and not out.exists()
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(expected_words) + 1
        assert all(word in line for word, line in zip(expected_words, said))


def test_a_failed_parity_is_exit_status_1_and_other_heads_are_told(tmp_path, capsys, monkeypatch):
    model = perturbed.tiny()
    saved_model.save_model(tmp_path / "model", model, perturbed.params(model))
    monkeypatch.setattr(names, "REFERENCE_HEADS", {("decoder", 36): 9, ("image", 48): 4})
    right = torch_module.run_module
    wrong = lambda *args: right(*args) | {"text_embed": right(*args)["text_embed"] * 1.001}
    arguments = ["--input", str(tmp_path / "model"), "--output", str(tmp_path / "x.pth.tar")]
    monkeypatch.setattr(torch_module, "run_module", wrong)
    assert main(["to-torch", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out.endswith("parity: FAILED: text_embed\n") and "nothing was written" not in err
    (line,) = [line for line in out.splitlines() if "ATTENTION" in line]
    assert line.startswith("decoder: width 36, depth 2, 3 heads") and " 9 " in line
    monkeypatch.setattr(torch_module, "run_module", lambda *args: {})
    assert main(["to-torch", *arguments]) == 1
    assert "text_embed: only one side gives it" in capsys.readouterr().err
