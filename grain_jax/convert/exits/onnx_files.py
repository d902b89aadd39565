"""The command to-onnx: ONNX files of a model, which run without torch, JAX and grain_jax."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from grain_jax import __version__, inference
from grain_jax import config as config_lib
from grain_jax.convert import export, output, parity
from grain_jax.convert.exits import folder, tokenizers
from grain_jax.convert.faults import ConvertError, needing
from grain_jax.convert.reference import module as torch_module
from grain_jax.convert.reference import names

DESCRIPTION = "onnx.json"  # marks the folder
_PARTS = ("image", "text", "boxes", "maps")
_PREPARE = "RGB / 255, minus pixel_mean, divided by pixel_std; float32 [batch, 3, size, size]"


def to_onnx(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-onnx: a model that `grain_jax.load` reads to image.onnx, text.onnx, and boxes.onnx, maps.onnx where it has them.

    The number of images, texts and boxes is free. `onnx.json` says what the files take, and the opset; the tokenizer's files
    go with them.

    Args:
      source: a workdir, a checkpoint or a converted folder.
      path: the folder; new, or an older one of this command.

    Raises:
      ConvertError: the torch module cannot express the model, a package is missing, or the folder holds something else.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    target = output.check_free(path, DESCRIPTION)
    found, unknown = tokenizers.with_end(folder.read(source))
    names.refuse(found.model, "to-onnx")
    with needing("torch, transformers, onnx or onnxscript", "to-onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import torch

        if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
            raise ConvertError(
                f"to-onnx: torch {torch.__version__} exports no free numbers of images; pip install -U torch"
            )
        module = torch_module.make_module(found.model)
    torch_module.load_states(module, names.state_dicts(found.params))
    words, missing = tokenizers.files(found.model.text, found.folder)
    if (
        found.model.text.tokenizer == "clip"
    ):  # transformers would pad with the end token, which onnx.json does not say
        words.pop("tokenizer_config.json", None)
    with output.replacing(target, DESCRIPTION) as new:
        with _quiet():
            module.export_onnx(str(new))
        described = _description(found, new)
        for name, content in {DESCRIPTION: described, **words}.items():
            folder.write_file(new / name, content)
        proof = _prove(new, found).but(unknown)
    lines = [f"to-onnx: {found.folder} -> {target}, opset {described['opset']}"]
    for name, signature in described["files"].items():
        sides = (
            ", ".join(f"{n} {kind}" for n, kind in side.items()) for side in signature.values()
        )
        lines.append(f"{name}: {' -> '.join(sides)}")
    return proof.after(*lines, *([missing] if missing else []))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own warnings, which nobody can act on; its errors stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _description(source: folder.Source, path: epath.Path) -> dict[str, Any]:
    """What `onnx.json` says of the files in `path`."""
    import onnx
    import torch

    predictor = inference.Predictor(source.model, source.params)
    files, opsets = {}, set()
    for part in _PARTS:
        file = path / f"{part}.onnx"
        if not file.exists():
            continue
        model = onnx.load(str(file), load_external_data=False)
        opsets |= {x.version for x in model.opset_import if x.domain in ("", "ai.onnx")}
        sides = {"inputs": model.graph.input, "outputs": model.graph.output}
        files[file.name] = {
            side: {value.name: _type(value.type.tensor_type) for value in values}
            for side, values in sides.items()
        }
    (opset,) = opsets
    image, text, learnt = export.describe(predictor)
    return {
        "grain_jax": __version__,
        "torch": torch.__version__,
        "opset": opset,
        "files": files,
        "image": image | {"normalised_by": f"you: {_PREPARE}"},
        "text": text | {"end": "found by the file"},
        **learnt,
    }


def _type(tensor: Any) -> str:
    import onnx

    name = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return f"{name}[{', '.join(x.dim_param or str(x.dim_value) for x in tensor.shape.dim)}]"


@folder.needing_packages
def _prove(target: epath.Path, source: folder.Source) -> parity.Report:
    """Our model against ONNX Runtime on the files, with other numbers of images, texts and boxes than were traced."""
    import onnxruntime

    given = parity.inputs_of(source.model)
    predictor = inference.Predictor(source.model, source.params)
    ours = parity.outputs_of(predictor, given)
    sessions = {
        part: onnxruntime.InferenceSession(
            f"{target}/{part}.onnx", providers=["CPUExecutionProvider"]
        )
        for part in _PARTS
        if (target / f"{part}.onnx").exists()
    }
    theirs = _run(sessions, given, slice(None))
    one = _run(sessions, given, slice(1))
    ids = _token_ids(target, source.model.text)
    if "similarity_map" in theirs:
        texts = [ours["text_embed"]] * len(given.images)
        ours["similarity_map"] = np.stack(predictor.similarity_maps(given.images, texts))
    found = parity.compare(ours, theirs)
    alone = parity.compare({name: x[:1] for name, x in _one(ours).items()}, one)
    found += [c._replace(name=f"{c.name}, one") for c in alone]
    if ids is not None:
        wanted = {
            "token_ids": tokenizers.own_ids(source.model.text, source.folder),
            "encode_text": tokenizers.our_embeddings(source),
        }
        embeds: Any = sessions["text"].run(["text_embeds"], {"input_ids": ids.astype(np.int64)})
        found += parity.compare(wanted, {"token_ids": ids, "encode_text": embeds[0]})
    return parity.report(found, f"onnxruntime {onnxruntime.__version__}", given)


def _token_ids(path: epath.Path, tower: config_lib.TextTower) -> np.ndarray | None:
    """The ids of `tokenizers.TEXTS` by the files, used as docs/howto/onnx.md says; None where there are none."""
    context = tower.context_length
    if (path / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        library = Tokenizer.from_file(str(path / "tokenizer.json"))
        library.enable_truncation(context)
        library.enable_padding(length=context, pad_id=tower.pad_id)
        return np.array([x.ids for x in library.encode_batch(tokenizers.TEXTS)])
    if (path / "spiece.model").exists():
        import transformers

        library = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        return np.array(
            library(tokenizers.TEXTS, padding="max_length", truncation=True)["input_ids"]
        )
    return None


def _one(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of the first image and the first text: maps have an axis of texts, too."""
    return {name: x[:, :1] if name == "similarity_map" else x for name, x in outputs.items()}


def _run(sessions: Any, given: parity.Inputs, rows: slice) -> dict[str, np.ndarray]:
    """The outputs of the files by the names of the parity, of those images and texts."""
    pixels = np.ascontiguousarray(given.images[rows].transpose(0, 3, 1, 2))
    feeds: dict[str, np.ndarray] = {
        "pixel_values": pixels,
        "input_ids": given.token_ids[rows].astype(np.int64),
        "boxes_xyxy": np.repeat(parity.BOXES[None], len(pixels), axis=0),
    }
    out = {}
    for session in sessions.values():  # the texts before the maps, which take their embeddings
        inputs = {x.name: feeds[x.name] for x in session.get_inputs()}
        outputs = dict(zip((x.name for x in session.get_outputs()), session.run(None, inputs)))
        feeds |= {"text_embeds": outputs["text_embeds"]} if "text_embeds" in outputs else {}
        out |= {name.removesuffix("s"): value for name, value in outputs.items()}
    return out
