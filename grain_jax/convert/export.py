"""A model as StableHLO (`jax.export`): functions and parameters that run without grain_jax.

  grain-jax export --checkpoint DIR --output DIR [--dtype float32|bfloat16]

Every function takes any number of images or texts and is lowered for CPUs, CUDA and TPUs at once. The
parameters lie beside them in one file, since the functions share them (docs/library.md shows their use).
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export as jax_export

from grain_jax import inference
from grain_jax.convert import output as files
from grain_jax.convert import parity, tables
from grain_jax.convert.arguments import Export
from grain_jax.convert.exits import folder, tokenizers
from grain_jax.core import errors
from grain_jax.core.version import __version__
from grain_jax.inference import jitted, scores
from grain_jax.models import box_head, grain

DESCRIPTION = "model.json"  # marks the folder
PLATFORMS = ("cpu", "cuda", "tpu")
_IMAGES = 3  # of the check; the Predictor pads them to another number


def export_model(
    predictor: inference.Predictor, output: epath.PathLike, platforms: Sequence[str] = PLATFORMS
) -> list[parity.Comparison]:
    """Writes the `.stablehlo` of `image`, `text`, `regions`, `boxes` and `maps`, `params.npz`, `model.json`.

    `tokenizer.json` prepares texts. A model without regions has no `regions.stablehlo`, one without a
    box head no `boxes.stablehlo`, one whose images have no grid of patches no `maps.stablehlo`. What was
    written is read back and runs on this machine. Activations have the `dtype` of the predictor.

    Returns:
      for each output of each function how far it is from the predictor's (`parity.tolerance`).

    Raises:
      ConvertError: the folder holds something else, or cannot be written.
    """
    target = files.check_free(output, DESCRIPTION)
    token_files, missing = tokenizers.alone(predictor.model.text, predictor.folder)
    if missing:
        print(missing, file=sys.stderr)
    params: dict[str, Any] = {name: np.asarray(x) for name, x in grain.flat(predictor.params).items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    exported = {}
    for name, (function, inputs) in _functions(predictor).items():
        program = jax_export.export(jax.jit(function), platforms=platforms)
        exported[name] = program(shapes, *inputs.values()), tuple(inputs)
    with files.replacing(target, DESCRIPTION) as new:
        with (new / "params.npz").open("wb") as file:
            np.savez(file, **params)
        for name, (program, _) in exported.items():
            (new / f"{name}.stablehlo").write_bytes(program.serialize())
        folder.write_files(new, token_files | {DESCRIPTION: _description(predictor, exported, missing)})
        return _compare(predictor, new, exported)


def _functions(predictor: inference.Predictor) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Each function of (flat params, *inputs), and its inputs' names, shapes and types."""
    model, dtype, nested = predictor.model, predictor.dtype, tables.nested
    encode_images = jitted.image_program(model, dtype)
    encode_texts = jitted.text_program(model, dtype)
    encode_boxes = jitted.image_program(model, dtype, "box_embeddings")

    def regions(params, image):
        image_embed, (boxes_xyxy, embed, prior) = encode_images(nested(params), image)
        out = dict(image_embed=image_embed, region_embed=embed, boxes_xyxy=boxes_xyxy)
        return out | ({"region_prior": prior} if predictor.has_proposals else {})

    image = lambda params, image: {"image_embed": regions(params, image)["image_embed"]}
    boxes = lambda params, image, boxes_xyxy: {"box_embed": encode_boxes(nested(params), image, boxes_xyxy)}
    text = lambda params, tokens, end: {"text_embed": encode_texts(nested(params), tokens, end)}
    size, context = model.image.image_size, model.text.context_length
    b, r, n = jax_export.symbolic_shape("b, r, n")
    rows, length = b, context
    if model.text.packable:  # another one sees its padding: rows as long as in training
        rows, length = jax_export.symbolic_shape("b, l", constraints=[f"l <= {context}"])
    spec = jax.ShapeDtypeStruct
    images = {"image": spec((b, size, size, 3), np.uint8)}
    texts = {"tokens": spec((rows, length), np.int32), "end": spec((rows,), np.int32)}
    functions = {"image": (image, images), "text": (text, texts)}
    if predictor.has_regions:
        functions["regions"] = (regions, images)
    if predictor.has_box_head:
        functions["boxes"] = (boxes, images | {"boxes_xyxy": spec((b, r, 4), np.float32)})
    if maps := _maps(predictor):
        embeds = {"text_embed": spec((n, model.embed_dim), np.float32)}
        functions["maps"] = (maps, images | embeds)
    return functions


def _maps(predictor: inference.Predictor) -> Callable | None:
    """`Predictor.similarity_map` as a function of (flat params, images, text_embed [N, D]), or None."""
    program = functools.partial(jitted.image_program, predictor.model, predictor.dtype)
    try:
        grid = predictor.grid if predictor.has_patches or predictor.has_regions else 0
    except inference.InputError:
        grid = 0

    def maps(params, image, text_embed):
        all_maps, params = [], tables.nested(params)
        with jax.default_matmul_precision("highest"):  # of cosines
            if predictor.has_patches:
                cells = box_head.token_boxes(grid * grid, 0)
                boxes = [jnp.broadcast_to(cells, (image.shape[0], *cells.shape))] * predictor.has_box_head
                patches = program("box_embeddings" if boxes else "patch_embeddings")(params, image, *boxes)
                cosines = jnp.einsum("nd,bpd->bnp", text_embed, patches.astype(np.float32))
                all_maps.append(cosines.reshape(*cosines.shape[:2], grid, grid))
            if predictor.has_regions:
                _, (corners, embed, prior) = program()(params, image)
                cosines = jnp.einsum("nd,bqd->bnq", text_embed, embed.astype(np.float32)) + prior[:, None]
                region_map = lambda values, boxes: scores.region_map(values, boxes, grid, jnp)
                all_maps.append(jax.vmap(region_map)(cosines, corners))
        return {"similarity_map": sum(all_maps) / len(all_maps)}

    return maps if grid else None


def _description(predictor: inference.Predictor, exported: Mapping[str, Any], missing: str) -> dict[str, Any]:
    """What `model.json` says, with the arguments of each function; `params` are all arrays of params.npz."""
    tower = predictor.model.text
    end = "not looked at: zeros will do"
    if tower.seeks_end:
        which = "; for CLIP's ids tokens.argmax(1)" if tower.end_id is None else ", before the padding"
        which = f", the id {tower.end_id}" if tower.has_end_id else which
        end = f"position of each text's last token{which}"
    return {
        "jax": jax.__version__,
        "platforms": list(exported["image"][0].platforms),
        "activations": predictor.dtype,
        "functions": {name: ["params", *inputs] for name, (_, inputs) in exported.items()},
        **describe(predictor, "the function: give it the uint8 values", end, missing),
    }


def describe(predictor: inference.Predictor, normalised_by: str, end: str, missing: str) -> dict[str, Any]:
    """What a user of exported files must know of images, texts and scores, as values of JSON.

    `normalised_by`: who normalises pixels; `end`: how the end of a text is known; `missing`: why there is no
    tokenizer.json, or "".
    """
    image, text = predictor.model.image, predictor.model.text
    cleans = "tokenizer.json, which cleans, cuts and pads texts"
    if text.cleaning == "lower":
        cleans += "; it repairs no broken encodings and no HTML entities"
    about: dict[str, Any] = {
        "grain_jax": __version__,
        "image": {
            "size": image.image_size,
            "prepare": "turned by the EXIF orientation, RGB, resized to a square by Pillow's bicubic filter"
            " (antialiased), no crop",
            "pixel_mean": list(image.pixel_mean),
            "pixel_std": list(image.pixel_std),
            "normalised_by": normalised_by,
        },
        "text": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "tokenizer": missing or cleans,
            "cleaning": text.cleaning,
            "pad_id": text.pad_id,
            "end": end,
        },
        "logit_scale": float(np.exp(predictor.params["logit_scale"])),
    }
    if predictor.logit_bias is not None:
        about["logit_bias"] = float(predictor.logit_bias)
    return about


def _compare(
    predictor: inference.Predictor, output: epath.Path, exported: Mapping[str, Any]
) -> list[parity.Comparison]:
    """The functions, as they were written, against the predictor, on random images and texts."""
    tolerance = parity.tolerance(predictor.model, predictor.dtype)
    with (output / "params.npz").open("rb") as file:
        params = jax.device_put(dict(np.load(file)))
    batch = parity.inputs_of(predictor.model, count=_IMAGES)
    pixels = np.random.default_rng(0).integers(0, 256, batch.images.shape, np.uint8)
    expected = parity.outputs_of(predictor, batch._replace(images=pixels))
    inputs = {"image": pixels, "tokens": batch.token_ids, "text_embed": expected["text_embed"]}
    inputs["end"] = predictor.model.text.ends(batch.token_ids).astype(np.int32)
    inputs["boxes_xyxy"] = np.repeat(parity.BOXES[None], _IMAGES, axis=0)
    if "maps" in exported:
        texts = [expected["text_embed"]] * _IMAGES
        expected["similarity_map"] = np.stack(predictor.similarity_maps(pixels, texts))
    comparisons = []
    for name, (_, names) in exported.items():
        function = jax_export.deserialize(bytearray((output / f"{name}.stablehlo").read_bytes()))
        got: Any = function.call(params, *(inputs[each] for each in names))
        compared = parity.compare(got, {key: expected[key] for key in got}, tolerance=tolerance)
        comparisons += [c._replace(name=f"{name}: {c.name}") for c in compared]
    return comparisons


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a checkpoint; returns 0, 1 for other outputs or a full disk, 2 for wrong input."""
    try:
        args = Export.parse(arguments)
        files.check_free(args.output, DESCRIPTION)  # before the model is loaded
        with errors.out_of_memory_in_a_line("export"):
            model = inference.load(args.checkpoint, dtype=args.dtype)
            compared = export_model(model, args.output)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    report = parity.report(compared, "the predictor")
    print(report.text)
    return 0 if report.ok else 1
