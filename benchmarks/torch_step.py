"""The train step of GRAIN in PyTorch, written for speed, for the comparison in `benchmarks.train_step`.

The model is `grain_jax/convert/hf_files/modeling_grain.py` (attention by scaled_dot_product_attention), the
optimizer torch's fused AdamW, the matching SciPy's on the host. Each real text is padded to a row of 77, as in the
reference, or the texts are packed as ours.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.matching import by_scipy
from grain_jax.convert.hf_files import modeling_grain as modeling
from grain_jax.core import schema

_NO_DECAY = ("query_embed", "pos_embed", "positional_embedding", "token_embedding", "cls_token")


class Placed(NamedTuple):
    """A batch on the device."""

    image: torch.Tensor  # uint8 [B, H, W, 3]
    # Tokens, positions, segments [rows, L] and the places of the end tokens [N]; or tokens [N, L], padded.
    texts: tuple[torch.Tensor, ...]
    caption_id: torch.Tensor  # [B], of one caption an image
    description_id: torch.Tensor  # of the real regions
    region_boxes_cxcywh: torch.Tensor  # [B, R, 4]
    region_mask: torch.Tensor  # bool [B, R], on the host, where the matching is


class TorchStep:
    """A model, its optimizer and its compiled parts; `step` and `loss` take what `place` makes of a batch.

    Args:
      module: the `GrainModel` to train.
      compiled: whether towers and decoder are compiled by torch.compile.
      autocast: the dtype of activations on a GPU, or None.
    """

    def __init__(self, module: Any, *, compiled: bool = False, autocast: torch.dtype | None = None):
        self.module, self.autocast = module, autocast
        self.device = next(module.parameters()).device
        self._mean, self._std = (
            torch.tensor(x, dtype=torch.float32, device=self.device)
            for x in (schema.IMAGE_MEAN, schema.IMAGE_STD)
        )
        wrap = (
            (lambda part: torch.compile(part, dynamic=False)) if compiled else (lambda part: part)
        )
        self._visual, self._decoder = wrap(module.backbone.visual), wrap(module.decoder)
        self._padded_texts = wrap(module.backbone.encode_text)
        self._packed_texts = wrap(self._packed)
        groups = {0.1: [], 0.0: []}  # weight decay -> parameters
        for name, p in module.named_parameters():
            decays = p.ndim > 1 and not any(n in name for n in _NO_DECAY)
            groups[0.1 if decays else 0.0].append(p)
        self.optimizer = torch.optim.AdamW(
            [dict(params=params, weight_decay=decay) for decay, params in groups.items()],
            lr=1e-3,
            betas=(0.9, 0.98),
            eps=1e-8,
            fused=True,
        )

    def place(self, batch: schema.Batch, *, packed: bool) -> Placed:
        """A numpy batch on the device, its texts packed or padded."""
        to = lambda x: torch.as_tensor(np.asarray(x)).to(self.device)
        ends = to(_text_places(batch))
        if packed:
            rows = (batch.text_tokens, batch.text_positions, batch.text_segments)
            texts = (*(to(x).long().flatten(0, 1) for x in rows), ends)
        else:
            texts = (to(_padded_tokens(batch)).long(),)
        # Descriptions and pairs are both in the order of the mask.
        return Placed(
            to(batch.image),
            texts,
            to(batch.caption_id[:, 0]),
            to(batch.description_id[batch.region_mask]),
            to(batch.region_boxes_cxcywh),
            torch.as_tensor(batch.region_mask),
        )

    def step(self, batch: Placed) -> float:
        """One step of training; returns the loss."""
        self.module.train()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.clip_logit_scale()
        return float(loss.detach())

    def timed(self, batch: Placed) -> float:
        """A step that waits for the device; returns the loss."""
        loss = self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def loss(self, batch: Placed) -> torch.Tensor:
        """L_ic + L_box + L_rd (docs/method.md, Losses), without equal texts among the negatives."""
        backbone = self.module.backbone
        pixels = (batch.image.float() / 255 - self._mean) / self._std
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            image, regions, boxes = self._decoder(self._visual(pixels.permute(0, 3, 1, 2)))
            encode = self._packed_texts if len(batch.texts) > 1 else self._padded_texts
            texts = encode(*batch.texts)
        image, regions, texts = (F.normalize(x.float(), dim=-1) for x in (image, regions, texts))
        captions, descriptions = texts[: len(image)], texts[len(image) :]
        scale = backbone.logit_scale.exp()

        same = batch.caption_id[:, None] == batch.caption_id
        same = same & ~torch.eye(len(image), dtype=torch.bool, device=self.device)
        logits = (scale * image @ captions.T).masked_fill(same, -math.inf)
        own = torch.arange(len(image), device=self.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        if not len(descriptions):
            return loss

        target = batch.region_boxes_cxcywh
        found = _match(boxes[-1], target, batch.region_mask)
        matched, region, query = (x.to(self.device) for x in found)
        pred, real = boxes[-1][matched, query].float(), target[matched, region]
        box = (pred - real).abs().sum() + (1 - modeling._giou(pred, real, 0.0)).sum()
        ids = batch.description_id
        label = torch.arange(len(ids), device=self.device)
        same = (ids[:, None] == ids) & (label[:, None] != label)
        logits = (scale * regions[matched, query] @ descriptions.T).masked_fill(same, -math.inf)
        return loss + box / len(ids) + F.cross_entropy(logits, label)

    def _packed(self, tokens, positions, segments, ends):
        """Packed rows [rows, L] and the positions of end tokens in them [N] -> [N, D]."""
        backbone = self.module.backbone
        x = backbone.token_embedding(tokens) + backbone.positional_embedding[positions]
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        for block in backbone.transformer.resblocks:
            attention = block.attn
            q, k, v = F.linear(
                block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias
            ).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + attention.out_proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return backbone.ln_final(x.flatten(0, 1)[ends]) @ backbone.text_projection


def _text_places(batch: schema.Batch) -> np.ndarray:
    """Positions of the end tokens in the concatenated rows of the batch, int64 [N]: captions, then real descriptions."""
    groups, rows, length = batch.text_tokens.shape
    group = np.arange(len(batch.image)) // (len(batch.image) // groups)
    place = lambda group, at: (group * rows + at[..., 0]) * length + at[..., 1]
    captions = place(group, batch.caption_at[:, 0])
    descriptions = place(group[:, None], batch.description_at)[batch.region_mask]
    return np.concatenate([captions, descriptions]).astype(np.int64)


def _padded_tokens(batch: schema.Batch) -> np.ndarray:
    """The same texts, one a row, int32 [N, L], zeros after the end."""
    length = batch.text_tokens.shape[-1]
    flat_tokens, flat_positions = batch.text_tokens.reshape(-1), batch.text_positions.reshape(-1)
    ends = _text_places(batch)
    out = np.zeros((len(ends), length), np.int32)
    for row, end in zip(out, ends):
        count = flat_positions[end] + 1
        row[:count] = flat_tokens[end + 1 - count : end + 1]
    return out


def _match(boxes, target, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(image, region, query) of every matched region, in the order of the mask, by SciPy on the host."""
    with torch.no_grad():
        pred, real = boxes[:, :, None].float(), target[:, None]
        cost = 5 * (pred - real).abs().sum(-1) - 2 * modeling._giou(pred, real, 0.0)
    query = by_scipy(cost.cpu().numpy(), mask.numpy())[mask.numpy()]
    return *mask.nonzero(as_tuple=True), torch.from_numpy(query.astype(np.int64))
