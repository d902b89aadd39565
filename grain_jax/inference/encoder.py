"""Batches of images, boxes and texts through a model, whose embeddings come back as numpy."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from grain_jax.core import schema
from grain_jax.inference import batches, inputs, jitted
from grain_jax.inference.loaded_model import LoadedModel

Boxes: TypeAlias = Iterable[Any] | np.ndarray  # for each image its boxes [n, 4], xyxy in [0, 1]
_ROW_LENGTHS = (16, 32, 64)  # token rows are cut to these lengths: most texts are short


class Encoder(LoadedModel):
    """Embeds images, regions, boxes, patches and texts; `Predictor` builds on it and has its documentation.

    Wherever a method takes images, it takes their tokens (`encode_tokens`), too.
    """

    def preprocess(self, image: inputs.OneImage | np.ndarray) -> np.ndarray:
        """An image -> float32 [S, S, 3], resized and normalised, for calls with `normalized=True`."""
        return inputs.normalised(inputs.resize(0, image, self.model.image.image_size), self.model.image)

    def warm_up(self, images: int = 1) -> None:
        """Compiles the programs of calls with so many images and a few texts, before the first of them."""
        size = self.model.image.image_size
        blank = np.zeros((images, size, size, 3), np.uint8)
        self._encode(blank)
        if self.has_regions and self.grounding_head != "embeddings":
            self._encode(blank, self.grounding_head)
        self.encode_text(["a"])

    def _encode(self, images: inputs.OneOrMany, head: str = "embeddings") -> Any:
        """What a head of jitted.image_program makes of images, as float32."""
        program = jitted.image_program(self.model, self.dtype, head)
        results = self._runner.over_images(program, images)
        return jax.tree.map(lambda x: x.astype(np.float32), results)

    @inputs.one_or_many
    def encode_image(self, images: inputs.OneOrMany, *, normalized: bool = False) -> np.ndarray:
        """Images -> float32 [B, D], unit length; one image -> [D]."""
        return self._encode(inputs.marked(images, normalized))[0]

    def encode_regions(self, images: inputs.OneOrMany, *, normalized: bool = False) -> schema.Regions:
        """Images -> boxes_xyxy [B, Q, 4] in [0, 1], embed [B, Q, D] and prior [B, Q]; one image: without B.

        With `model.boxes.proposals` a region is the box that a patch predicts, and Q the number of patches.
        """
        return self.encode_image_and_regions(images, normalized=normalized)[1]

    @inputs.one_or_many
    def encode_image_and_regions(
        self, images: inputs.OneOrMany, *, normalized: bool = False
    ) -> tuple[np.ndarray, schema.Regions]:
        """(`encode_image(images)`, `encode_regions(images)`) in one pass."""
        self.need_regions("regions")
        return self._encode(inputs.marked(images, normalized))

    def encode_tokens(
        self, images: inputs.OneOrMany, *, normalized: bool = False, values: bool = False
    ) -> inputs.Tokens:
        """A batch of images -> their tokens, which the other methods take in their place.

        With `values`, each token of the last layer attends to itself alone (MaskCLIP, Zhou et al. 2022).
        """
        method = "image_values" if values else "image_tokens"
        program = jitted.program(self.model, self.dtype, method)
        return inputs.Tokens(self._runner.over_images(program, inputs.marked(images, normalized)))

    @inputs.for_each_image
    def encode_boxes(self, images: inputs.Images, boxes_xyxy: Boxes) -> list[np.ndarray]:
        """The embeddings of given boxes by the box head: for each image float32 [n, D], unit length.

        `boxes_xyxy` has for each image its boxes [n, 4], n = 0, 1, 2, ..., corners in [0, 1] of the image;
        they may reach over its edge.
        """
        if not self.has_box_head:
            lacking = "the model has no box head (model.boxes.kind is none)"
            expected = "one that was trained with loss.box_description"
            raise inputs.InputError(f"boxes: {lacking}, expected {expected}")
        program = jitted.image_program(self.model, self.dtype, "box_embeddings")
        boxes, embeds = inputs.checked_boxes(boxes_xyxy), []
        for batch in self._runner.batches(images):
            of_batch = boxes[len(embeds) : len(embeds) + len(batch)]
            of_batch += [np.zeros((0, 4), np.float32)] * (len(batch) - len(of_batch))
            # A power of two of boxes per image, so that few programs are compiled.
            most = 1 << (max(map(len, of_batch)) - 1).bit_length()
            padded = np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in of_batch])
            results = self._runner.run(program, batch, padded)
            embeds += [embed[: len(x)].astype(np.float32) for embed, x in zip(results, of_batch)]
        if len(embeds) != len(boxes):
            got = f"got boxes of {len(boxes)} images, expected of {len(embeds)}"
            raise inputs.InputError(f"boxes_xyxy: {got}, as many as images")
        return embeds

    @inputs.one_or_many
    def encode_patches(self, images: inputs.OneOrMany, sides: Sequence[int] = (1,)) -> np.ndarray:
        """Images -> an embedding of each patch, float32 [B, h, w, D], unit length; one image -> [h, w, D].

        With a box head a patch is a box, or the mean of boxes around it that are `sides` patches wide. A
        model of two towers pools each patch alone, as MaskCLIP does (Zhou et al. 2022).
        """
        grid = self.grid
        if not self.has_patches:
            got = "patches: got a model with a decoder and no box head"
            raise inputs.InputError(f"{got}, expected a box head; similarity_maps asks the regions")
        if self.has_box_head:
            tokens = images if isinstance(images, inputs.Tokens) else self.encode_tokens(images)
            boxes = [_boxes_around(grid, sides)] * len(tokens.values)
            patches = np.array([_means(x, sides) for x in self.encode_boxes(tokens, boxes)])
        else:
            patches = self._encode(images, "patch_embeddings")
        return patches.reshape(-1, grid, grid, self.model.embed_dim)

    def tokenizer(self, texts: str | Iterable[str]) -> np.ndarray:
        """Texts -> token ids int32 [N, L], padded, as `encode_text` takes them; one text -> [L]."""
        if isinstance(texts, str):
            return self.tokenizer([texts])[0]
        tokens, ends = self._tokens(list(texts))
        tower = self.model.text
        if tower.seeks_end and (tower.ends(tokens) != ends).any():
            expected = "the highest id" if tower.end_id is None else f"the id {tower.end_id}"
            raise inputs.InputError(
                f"tokenizer: got texts of {tower.tokenizer} that do not end with {expected}, by which"
                " encode_text finds the end; give encode_text the texts"
            )
        return tokens

    def encode_text(self, texts: inputs.Texts) -> np.ndarray:
        """Texts -> float32 [N, D], unit length; one text -> [D].

        Texts are strings, or int32 token ids [N, L] (`tokenizer`); or one string, or ids [L]. The highest id
        of a row ends its text, as in CLIP, or what `model.text.end_id` says. Shorter rows are padded for a
        tower that sees its padding.
        """
        if inputs.is_one_text(texts):
            return self.encode_text(inputs.one_text(texts))[0]
        tokens, ends = self._tokens(texts)
        program = jitted.text_program(self.model, self.dtype)
        # One program for most calls; more of them, with less padding, for many texts.
        lengths, kinds = _ROW_LENGTHS[1:], (batches.FEW,)
        if len(tokens) > 16 * batches.MAX_BATCH:
            lengths, kinds = _ROW_LENGTHS, (batches.MAX_BATCH, batches.FEW)
        out = np.empty((len(tokens), self.model.embed_dim), np.float32)
        order = np.argsort(ends, kind="stable")  # batches of short texts have short rows
        most = batches.MAX_BATCH * len(self._runner.devices)
        for first in range(0, len(tokens), most):
            rows = order[first : first + most]
            length = tokens.shape[1]
            if self.model.text.packable:  # tokens after the end token have no effect
                longest = int(ends[rows[-1]]) + 1
                length = next((n for n in lengths if longest <= n), length)
            positions = ends[rows].astype(np.int32)
            out[rows] = self._runner.run(program, tokens[rows, :length], positions, kinds=kinds)
        return out

    def _tokens(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [N, L] and the positions [N] at which the texts end."""
        tower = self.model.text
        vocabulary, context = tower.vocab_size, tower.context_length
        if not hasattr(texts, "dtype"):
            texts = list(texts)
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            if not texts:
                return np.zeros((0, context), np.int32), np.zeros(0, np.int32)
            ids, lengths, *_ = inputs.tokenizer_of(tower, self.folder).encode(texts, context)
            tokens = np.full((len(texts), context), tower.pad_id, np.int32)
            tokens[np.arange(context) < lengths[:, None]] = ids
            return tokens, lengths - 1
        tokens = np.asarray(texts)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not 1 <= tokens.shape[1] <= context:
            expected = f"strings or int32 token ids [N, at most {context}]"
            raise inputs.InputError(f"texts: got {inputs.kind_of(tokens)}, expected {expected}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            got = f"token ids {tokens.min()} to {tokens.max()}"
            raise inputs.InputError(f"texts: got {got}, expected 0 to {vocabulary - 1}")
        tokens = tokens.astype(np.int32)
        if tower.seeks_end and tower.has_end_id and (tokens != tower.end_id).all(1).any():
            end = f"{tower.end_id}, the end of a text (model.text.end_id)"
            raise inputs.InputError(f"texts: got token ids without {end}")
        ends = tower.ends(tokens)
        if not tower.packable:
            missing = ((0, 0), (0, context - tokens.shape[1]))
            tokens = np.pad(tokens, missing, constant_values=tower.pad_id)
        return tokens, ends


def _boxes_around(grid: int, sides: Sequence[int]) -> np.ndarray:
    """Boxes around each patch, `sides` patches wide, float32 xyxy [S * grid * grid, 4], cut at the image."""
    if min(sides, default=0) < 1:
        raise inputs.InputError(f"sides: got {tuple(sides)}, expected numbers of patches, 1 or more")
    y, x = np.divmod(np.arange(grid * grid), grid)
    middle = np.stack([x, y], axis=1) + 0.5
    half = np.array(sides)[:, None, None] / 2
    corners = np.concatenate([middle - half, middle + half], axis=-1).reshape(-1, 4)
    return np.clip(corners / grid, 0, 1).astype(np.float32)


def _means(embeds: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """Embeddings of the boxes of each of `sides` [S * P, D] -> their means, [P, D], unit length."""
    total = embeds.astype(np.float32).reshape(len(sides), -1, embeds.shape[-1]).sum(axis=0)
    return total / np.linalg.norm(total, axis=-1, keepdims=True)
