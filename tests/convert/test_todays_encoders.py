"""from-open-clip of MetaCLIP 2, FG-CLIP 1 and 2, SigLIP 2 of a fixed size and TIPS v2: outputs, gradients, faults."""

import copy
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("open_clip")
import open_clip.model as library  # noqa: E402
import safetensors.torch  # noqa: E402

from grain_jax.convert import parity, tables, towers  # noqa: E402
from grain_jax.convert.open_clip import checkpoint as files  # noqa: E402
from grain_jax.convert.open_clip import families  # noqa: E402
from grain_jax.convert.open_clip.command import from_open_clip  # noqa: E402
from grain_jax.convert.open_clip.towers import import_tower  # noqa: E402
from grain_jax.models import grain  # noqa: E402
from grain_jax.runtime import checkpoint  # noqa: E402
from tests import foreign  # noqa: E402

VOCAB, LENGTH, LONG, SIZE, PATCH, KEPT = 300, 12, 18, 32, 8, 5
NONE = towers.Settings()
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(vocab_size=VOCAB, max_position_embeddings=LENGTH)
IMAGE = dict(hidden_size=24, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
IMAGE |= dict(patch_size=PATCH)


def _stored(module, folder):
    """The arrays of a module by the names that its package writes to a file."""
    if isinstance(module, _FgClip):
        return {name: x.detach().numpy().copy() for name, x in module.state_dict().items()}
    module.save_pretrained(folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def _theirs(module, encode, images, ids, weights, folder):
    """Both embeddings, and the gradient of their weighted sum by the names of a file."""
    embeds = encode(module, foreign.torch_images(images), torch.from_numpy(ids).long())
    sum((e * torch.from_numpy(w)).sum() for e, w in zip(embeds, weights)).backward()
    gradient = copy.deepcopy(module)
    for of_gradient, parameter in zip(gradient.parameters(), module.parameters()):
        value = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        of_gradient.data = value
    gradient = {k: np.asarray(v) for k, v in _stored(gradient, folder).items()}
    return [e.detach().numpy() for e in embeds], gradient


def _ours(model, params, images, ids, weights):
    """As `_theirs`, with the gradient by our names."""
    module = grain.GRAIN(model)

    def value(params):
        apply = lambda method, *given: module.apply({"params": params}, *given, method=method)
        tokens = ids[:, None]
        at = np.stack([0 * ids[:, 0], model.text.ends(ids)], axis=1).astype(np.int32)
        positions = np.broadcast_to(np.arange(ids.shape[1]), tokens.shape)
        (text,) = apply(
            grain.GRAIN.encode_text, tokens, positions, np.ones_like(tokens), at
        )
        image, _, _ = apply(grain.GRAIN.encode_image, images)
        return (image * weights[0]).sum() + (text * weights[1]).sum(), (image, text)

    with jax.default_matmul_precision("highest"):
        (_, embeds), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    return embeds, grain.flat(gradient)


def _check(source, module, encode, tmp_path):
    """The folder or file `source` of `module` converts, with equal embeddings and gradients; model and report."""
    report = from_open_clip(source, tmp_path / "ours", NONE)
    assert report.verdict == "PROVEN", report.text
    model, params, _ = checkpoint.load_model(tmp_path / "ours")
    images, ids = parity.inputs(
        SIZE, VOCAB, model.text.context_length, seed=1, end_id=model.text.end_id
    )
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((2, len(images), model.embed_dim)).astype(np.float32)
    embeds, gradient = _theirs(module, encode, images, ids, weights, tmp_path / "gradient")
    ours, own = _ours(model, params, images, ids, weights)
    for a, b in zip(ours, embeds):
        foreign.close(np.asarray(a), b)
    stored = files.read(source)
    head = files.split(source)[1]
    gradient = families.take(gradient, stored.hf, head).state
    rows = [row for which in towers.TOWERS for row in import_tower(which, stored, NONE).rows]
    found = tables.write(rows, own)
    assert len(found) > 40
    top = max(np.abs(x).max() for x in gradient.values())
    worst = {n: np.abs(x - gradient[n]).max() / np.abs(gradient[n]).max() for n, x in found.items() if np.abs(gradient[n]).max() > 1e-3 * top}
    print(sorted(worst.items(), key=lambda x: -x[1])[:6], len(found) - len(worst))
    assert max(worst.values()) < 1e-5
    return model, params, report


def _hf_encode(module, images, ids):
    out = module(input_ids=ids, pixel_values=images)
    return out.image_embeds, out.text_embeds


def _hf(kind, **text):
    both = dict(projection_dim=20)
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | both | text,
        vision_config=IMAGE | dict(image_size=SIZE) | both,
        **both,
    )
    return foreign.perturb(getattr(transformers, f"{kind}Model")(config))


def test_metaclip_2(tmp_path):
    module = _hf("MetaClip2", eos_token_id=2, pad_token_id=1)
    module.save_pretrained(tmp_path / "theirs")
    model, _, _ = _check(tmp_path / "theirs", module, _hf_encode, tmp_path)
    text = model.text
    assert (text.end_id, text.pad_id, text.cleaning, text.packable) == (2, 1, "none", True)
    assert (text.activation, model.image.pre_norm) == ("quick_gelu", True)


class _FgClip(torch.nn.Module):
    """The facts of the public modelling files of FG-CLIP 1 and 2, on the towers of CLIP and SigLIP 2."""

    def __init__(self, kind):
        super().__init__()
        self.first = kind == "CLIP"
        text = TEXT | dict(projection_dim=20, eos_token_id=VOCAB - 1)
        image = IMAGE | dict(image_size=SIZE, projection_dim=20)
        if not self.first:
            text = TEXT | dict(projection_size=24)
            image = IMAGE | dict(num_patches=16)
        extra = dict(projection_dim=20) if self.first else {}
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=image, **extra)
        self.config = config
        base = getattr(transformers, f"{kind}Model")(config)
        self.text_model, self.vision_model = base.text_model, base.vision_model
        at = self.text_model.embeddings
        at.position_embedding_res = torch.nn.Embedding(LONG, 32)
        at.position_embedding_ori = torch.nn.Embedding(LONG, 32)
        scalar = lambda: torch.nn.Parameter(torch.tensor(2.0))
        self.logit_scale = scalar()
        if self.first:
            self.visual_projection, self.text_projection = base.visual_projection, base.text_projection
            self.text_filip_projection = torch.nn.Linear(32, 20, bias=False)
            self.logit_scale_finegraind, self.logit_scale_hardneg = scalar(), scalar()
        else:
            self.logit_bias = scalar()
            self.longtext_head, self.boxtext_head = torch.nn.Linear(32, 24), torch.nn.Linear(32, 24)
            self.dense_feature_head = copy.deepcopy(self.vision_model.head)

    def image(self, images):
        if self.first:
            return self.visual_projection(self.vision_model(pixel_values=images).pooler_output)
        grid = SIZE // PATCH
        x = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
        x = x.reshape(len(images), grid * grid, -1)
        mask, shapes = torch.ones(x.shape[:2]), torch.tensor([[grid, grid]] * len(x))
        return self.vision_model(x, mask, shapes).pooler_output

    def text(self, ids, head):
        at, kept = self.text_model.embeddings, 20 if self.first else KEPT

        def embeddings(input_ids, **_):
            place = torch.arange(ids.shape[1])
            if head != "long":
                return at.token_embedding(ids) + at.position_embedding(place)
            is_kept = (place < kept).float()[:, None]
            both = at.position_embedding_ori(place) * is_kept
            return at.token_embedding(ids) + both + at.position_embedding_res(place) * (1 - is_kept)

        own_forward, at.forward = at.forward, embeddings
        own_head = getattr(self.text_model, "head", None)
        if own_head is not None:
            self.text_model.head = torch.nn.Identity()
        pooled = self.text_model(input_ids=ids).pooler_output
        at.forward = own_forward
        if own_head is None:
            of = dict(short="text_projection", long="text_filip_projection")
            return getattr(self, of[head])(pooled)
        self.text_model.head = own_head
        of = dict(short=own_head, long=self.longtext_head, box=self.boxtext_head)
        return of[head](pooled)

    def save(self, folder):
        folder.mkdir()
        state = {name: x.contiguous() for name, x in self.state_dict().items()}
        safetensors.torch.save_file(state, folder / "model.safetensors")
        config = self.config.to_dict()
        if not self.first:
            config["model_type"] = "fgclip2"
            config["text_config"] |= dict(model_type="fgclip2_text_model", keep_len=KEPT)
            config["text_config"]["longtext_len"] = LONG
            config["vision_config"]["model_type"] = "fgclip2_vision_model"
        (folder / "config.json").write_text(json.dumps(config))


def _fg_encode(head):
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    return lambda module, images, ids: (unit(module.image(images)), unit(module.text(ids, head)))


@pytest.mark.parametrize("kind,head", [("CLIP", "long"), ("Siglip2", "long"), ("Siglip2", "box")])
def test_fg_clip(kind, head, tmp_path):
    module = foreign.perturb(_FgClip(kind))
    module.save(tmp_path / "theirs")
    model, params, report = _check(f"{tmp_path}/theirs:{head}", module, _fg_encode(head), tmp_path)
