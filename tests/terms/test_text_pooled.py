"""text_pooled against torch's attention with an empty token, in float64."""

import functools

import jax
import numpy as np
import pytest
import torch

from grain_jax import config as config_lib
from grain_jax.terms.text_pooled import Options, TextPooled
from tests import tiny
from tests.models import test_towers
from tests.terms import fake

GROUP = 4


@functools.cache
def case():
    """(the term, what it sees, its parameters)."""
    c = tiny.config(text__pack_rows=12)
    term = TextPooled(Options(group=GROUP, heads=4, scale_init=3.0, bias_init=-1.5), c.model)
    seen = fake.seen(c, leading=1)
    # A description of two images of a group, and a caption that is another's description.
    seen.batch.description_id[1, :2] = seen.batch.description_id[0, 0]
    seen.batch.caption_id[3, 0] = seen.batch.description_id[2, 0]
    seen.batch.region_mask[:4, :2] = True
    seen.batch.region_mask[6] = False
    seen.batch.caption_mask[6] = False
    return term, seen, fake.random_parameters(term, seen)


def loss(term, params, seen):
    """(the mean loss, what the term gave)."""
    found = term.apply({"params": params}, seen)
    return found.loss.sum.sum() / found.loss.count.sum(), found


def replica(term, seen, params):
    """(loss, accuracy, gradients of tokens, descriptions, captions and parameters), one image at a time."""
    tensor = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    p = jax.tree.map(tensor, params)
    tokens, of_regions, of_captions = map(
        tensor, (seen.tokens, seen.outputs.region_text_embed, seen.outputs.text_embed)
    )
    d, heads = term.model.embed_dim, term.options.heads
    width = seen.tokens.shape[-1]
    norm = lambda name, x, eps: torch.nn.functional.layer_norm(
        x, x.shape[-1:], p[name]["scale"], p[name]["bias"], eps
    )
    matrix = lambda name, size: p[name]["kernel"].reshape(size, d).T

    def pool(texts, image):
        """What each text pools of an image, by the function of torch.nn.MultiheadAttention with `add_zero_attn`."""
        patches = tokens[image, seen.leading :][:, None]
        text_eps, image_eps = term.model.text.norm_eps, term.model.image.norm_eps
        found, _ = torch.nn.functional.multi_head_attention_forward(
            norm("text_norm", texts, text_eps)[:, None],
            norm("key_norm", patches, image_eps),
            norm("value_norm", patches, image_eps),
            embed_dim_to_check=d,
            num_heads=heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([p[n]["bias"].reshape(-1) for n in ("query", "key", "value")]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=True,
            dropout_p=0.0,
            out_proj_weight=p["out_kernel"].reshape(d, d).T,
            out_proj_bias=p["out_bias"],
            use_separate_proj_weight=True,
            q_proj_weight=matrix("query", d),
            k_proj_weight=matrix("key", width),
            v_proj_weight=matrix("value", width),
        )
        return torch.nn.functional.normalize(found[:, 0], dim=1)

    batch = seen.batch
    texts = [
        [
            (of_regions[i, s], batch.description_id[i, s])
            for s in np.flatnonzero(batch.region_mask[i])
        ]
        + [
            (of_captions[i, s], batch.caption_id[i, s])
            for s in np.flatnonzero(batch.caption_mask[i])
        ]
        for i in range(len(tokens))
    ]
    total, right, count = 0, 0, 0
    soft = torch.nn.functional.softplus
    for start in range(0, len(tokens), GROUP):
        members = range(start, start + GROUP)
        of_group = [(i, text, number) for i in members for text, number in texts[i]]
        matrix_of_texts = torch.stack([text for _, text, _ in of_group])
        cosine = {j: (pool(matrix_of_texts, j) * matrix_of_texts).sum(1) for j in members}
        for n, (i, _, number) in enumerate(of_group):
            z = {
                j: p["logit_scale"].exp() * cosine[j][n] + p["logit_bias"]
                for j in members
                if j == i or number not in [other for _, other in texts[j]]
            }
            total = total + soft(-z[i]) + sum(soft(z[j]) for j in z if j != i)
            right, count = right + (max(z, key=lambda j: z[j].item()) == i), count + 1
    (total / count).backward()
    gradients = jax.tree.map(lambda x: x.grad.numpy(), p)
    return (
        (total / count).item(),
        right / count,
        (
            tokens.grad.numpy(),
            of_regions.grad.numpy(),
            of_captions.grad.numpy(),
            gradients,
        ),
    )


def test_values_and_gradients_equal_torchs_attention():
    term, seen, params = case()

    def run(tokens, descriptions, captions, params):
        outputs = seen.outputs._replace(region_text_embed=descriptions, text_embed=captions)
        return loss(term, params, seen._replace(tokens=tokens, outputs=outputs))

    given = seen.tokens, seen.outputs.region_text_embed, seen.outputs.text_embed, params
    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True))
    (value, found), gradients = run(*given)
    expected, accuracy, expected_gradients = replica(term, seen, params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    measured = found.measures["accuracy"]
    assert measured.sum.sum() / measured.count.sum() == pytest.approx(accuracy, abs=1e-6)
    assert 0 < accuracy < 1
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected_gradients),
        jax.tree.leaves(gradients),
        strict=True,
    ):
        np.testing.assert_allclose(
            b, a, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-9, err_msg=str(path)
        )


def test_a_part_of_whole_groups_has_the_sums_of_the_whole():
    term, seen, params = case()
    run = lambda seen: jax.jit(lambda: term.apply({"params": params}, seen).loss)()
    whole = run(seen)
    found = run(fake.part(seen, 8, 16))
    np.testing.assert_allclose(found.sum, whole.sum[8:], rtol=1e-6)
    np.testing.assert_array_equal(found.count, whole.count[8:])
    assert whole.sum[6] == whole.count[6] == 0  # an image without texts
    descriptions = TextPooled(Options(group=GROUP, heads=4, captions=False), term.model)
    count = jax.jit(lambda: descriptions.apply({"params": params}, seen).loss)().count
    np.testing.assert_array_equal(count, seen.batch.region_mask.sum(1))


def test_the_group_is_no_axis_of_what_is_held():
    """The compiled gradient keeps no attention of all pairs of a group."""
    term, seen, params = case()
    sizes = []
    for group in (2, 8):
        grouped = term.clone(options=Options(group=group, heads=4))

        def run(tokens, grouped=grouped):
            return loss(grouped, params, seen._replace(tokens=tokens))[0]

        compiled = jax.jit(jax.grad(run)).lower(seen.tokens).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 1.3 * sizes[0]


def test_the_initial_bias_is_of_the_negatives_of_a_group():
    assert Options(group=16).bias == pytest.approx(-np.log(15))
    assert (Options(group=2).bias, Options(bias_init=2.0).bias) == (0, 2)


def test_what_a_run_misses():
    c = tiny.config()
    (fault,) = TextPooled.faults(Options(heads=5), c)
    assert fault == "heads: got 5, expected a divisor of model.embed_dim=16"
    assert TextPooled.group(Options(group=8)) == 8
    assert not TextPooled.faults(Options(heads=4), c)
    # Regions of a model without a decoder are read by a term.
    tiny.config(
        model__decoder=None,
        model__image__pool="mean",
        loss__box=0.0,
        loss__region_description=0.0,
        loss__terms__pool={"term": "text_pooled", "weight": 1.0},
    )
    pooled = config_lib.from_dict(test_towers.dictionary())
    first, second = TextPooled.faults(Options(heads=4, captions=False), pooled)
    tower = pooled.model.image.tower
    assert first == (
        f"model.image.tower: got {tower}, which pools its tokens, expected one with patches"
    )
    assert second == "captions: got False with input.max_regions=0, expected a text an image"
