"""The command to-onnx: ONNX files of a model, which run without torch, JAX and grain_jax."""

import logging
import warnings
from typing import Any

import numpy as np
from etils import epath

from grain_jax import inference
from grain_jax.checkpoint.saved_model import Stored
from grain_jax.convert import export, output, parity
from grain_jax.convert.exits import folder, needs, tokenizers
from grain_jax.convert.faults import needing, raise_any
from grain_jax.convert.reference import commands as reference
from grain_jax.convert.reference import names
from grain_jax.core import atomic
from grain_jax.inference.inputs import Normalized

DESCRIPTION = "onnx.json"  # marks the folder
PARTS = ("image", "text", "boxes", "maps")  # texts before maps, which take their embeddings
_PREPARE = "RGB / 255, minus pixel_mean, divided by pixel_std; float32 [batch, 3, size, size]"


def to_onnx(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-onnx: a model to image.onnx, text.onnx, and boxes.onnx, maps.onnx if it has them.

    The numbers of images, texts and boxes are free. `onnx.json` says how to prepare images, and
    `tokenizer.json` prepares texts.

    Raises:
      ConvertError: the torch module cannot express the model, a package is missing, or the folder is in use.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    target = output.check_free(path, DESCRIPTION)
    stored = tokenizers.with_end(folder.read(source))
    raise_any(needs.MODELING.faults(stored.model))
    with needing("torch, transformers, onnx or onnxscript", "to-onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import torch

        module = reference.make_module(stored.model, names.state_dict(stored.params))
    token_files, missing = tokenizers.alone(stored.model.text, stored.folder)
    with output.replacing(target, DESCRIPTION) as new:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # the exporter's own warnings, which nobody can act on
        try:
            with warnings.catch_warnings(action="ignore"):
                module.export_onnx(str(new))
        finally:
            logging.disable(before)
        folder.write_files(new, token_files)
        predictor = inference.Predictor(stored.model, stored.params)
        described = {
            "torch": torch.__version__,
            "files": [f"{part}.onnx" for part in PARTS if (new / f"{part}.onnx").exists()],
            "sha256": {x.name: atomic.digest(x.read_bytes()) for x in new.iterdir()},
            **export.describe(predictor, f"you: {_PREPARE}", "found by the file", missing),
        }
        folder.write_files(new, {DESCRIPTION: described})
        proof = _prove(new, stored)
    line = f"to-onnx: {stored.folder} -> {target}: {', '.join(described['files'])}"
    return proof.after(line, *filter(None, [missing]))


def _prove(target: epath.Path, source: Stored) -> parity.Report:
    """Our model against ONNX Runtime, with other numbers of images, texts and boxes than were traced."""
    inputs, ours = parity.inputs_of(source.model), {}
    if (target / "maps.onnx").exists():
        predictor = inference.Predictor(source.model, source.params)
        texts = [predictor.encode_text(inputs.token_ids)] * len(inputs.images)
        ours["similarity_map"] = np.stack(predictor.similarity_maps(Normalized(inputs.images), texts))

    def run(inputs: parity.Inputs) -> dict[str, np.ndarray]:
        import onnxruntime

        theirs: dict[str, np.ndarray] = {}
        feeds: dict[str, np.ndarray] = {
            "pixel_values": np.ascontiguousarray(inputs.images.transpose(0, 3, 1, 2)),
            "input_ids": inputs.token_ids.astype(np.int64),
            "boxes_xyxy": np.repeat(parity.BOXES[None], len(inputs.images), axis=0),
        }
        for file in (target / f"{part}.onnx" for part in PARTS):
            if file.exists():
                session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
                theirs |= _run(session, feeds)
                feeds["text_embeds"] = theirs.get("text_embed", np.empty(0))
        return theirs

    return parity.prove(source.model, source.params, "ONNX files", ("onnxruntime",), run, ours)


def _run(session: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a file by the names of the parity: of the first three rows, then of the last one."""
    parts = []
    for rows in (slice(3), slice(3, None)):
        names = [x.name for x in session.get_inputs()]
        inputs = {name: feeds[name] if name == "text_embeds" else feeds[name][rows] for name in names}
        parts.append(session.run(None, inputs))
    names = [x.name.removesuffix("s") for x in session.get_outputs()]
    return {name: np.concatenate(both) for name, both in zip(names, zip(*parts))}
