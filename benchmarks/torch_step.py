"""The train step of GRAIN in PyTorch, written for speed, for the comparison in `benchmarks.train_step`.

The model is `grain_jax/convert/hf_files/modeling_grain.py` (attention by scaled_dot_product_attention), the
optimizer torch's fused AdamW, the matching SciPy's on the host. Each real text is padded to a row of 77, as
in the reference, or the texts are packed as ours.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F

from benchmarks import our_step
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
        pixels = (schema.IMAGE_MEAN, schema.IMAGE_STD)
        self._mean, self._std = (torch.tensor(x, device=self.device).float() for x in pixels)
        wrap = lambda part: torch.compile(part, dynamic=False) if compiled else part
        self._visual, self._decoder = wrap(module.backbone.visual), wrap(module.decoder)
        self._padded_texts = wrap(module.backbone.encode_text)
        self._packed_texts = wrap(self._packed)
        decays = lambda name, p: p.ndim > 1 and not any(n in name for n in _NO_DECAY)
        named = list(module.named_parameters())
        groups = [
            dict(params=[p for n, p in named if decays(n, p) == decayed], weight_decay=decay)
            for decayed, decay in ((True, 0.1), (False, 0.0))
        ]
        adam = dict(lr=1e-3, betas=(0.9, 0.98), eps=1e-8, fused=True)
        self.optimizer = torch.optim.AdamW(groups, **adam)

    def on_device(self, batch: schema.Batch, *, packed: bool) -> Placed:
        """A numpy batch on the device, its texts packed or padded."""
        to = lambda x: torch.as_tensor(np.asarray(x)).to(self.device)
        texts = (to(our_step.padded_tokens(batch)).long(),)
        if packed:
            rows = (batch.text_tokens, batch.text_positions, batch.text_segments)
            texts = (*(to(x).long().flatten(0, 1) for x in rows), to(our_step.text_places(batch)))
        return Placed(
            to(batch.image),
            texts,
            to(batch.caption_id[:, 0]),
            to(batch.description_id[batch.region_mask]),  # in the order of the pairs
            to(batch.region_boxes_cxcywh),
            torch.as_tensor(batch.region_mask),
        )

    def step(self, batch: Placed) -> float:
        """One step of training, waiting for the device; returns the loss."""
        self.module.train()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.backbone.logit_scale.data.clamp_(0, math.log(100))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def loss(self, batch: Placed) -> torch.Tensor:
        """L_ic + L_box + L_rd (docs/method.md, Losses)."""
        backbone = self.module.backbone
        pixels = (batch.image.float() / 255 - self._mean) / self._std
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            image, regions, boxes = self._decoder(self._visual(pixels.permute(0, 3, 1, 2)))
            encode = self._packed_texts if len(batch.texts) > 1 else self._padded_texts
            texts = encode(*batch.texts)
        image, regions, texts = (F.normalize(x.float(), dim=-1) for x in (image, regions, texts))
        captions, descriptions = texts[: len(image)], texts[len(image) :]
        scale = backbone.logit_scale.exp()
        logits = _logits(scale * image, captions, batch.caption_id)
        labels = torch.arange(len(image), device=self.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

        target = batch.region_boxes_cxcywh
        pairs = _match(boxes[-1], target, batch.region_mask)
        matched, region, query = (x.to(self.device) for x in pairs)
        pred, real = boxes[-1][matched, query].float(), target[matched, region]
        box = (pred - real).abs().sum() + (1 - _giou(pred, real)).sum()
        logits = _logits(scale * regions[matched, query], descriptions, batch.description_id)
        labels = torch.arange(len(descriptions), device=self.device)
        return loss + box / len(descriptions) + F.cross_entropy(logits, labels)

    def _packed(self, tokens, positions, segments, ends):
        """Packed rows [rows, L] and the positions of end tokens in them [N] -> [N, D]."""
        backbone = self.module.backbone
        x = backbone.token_embedding(tokens) + backbone.positional_embedding[positions]
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        for block in backbone.transformer.resblocks:
            attention = block.attn
            projection = attention.in_proj_weight, attention.in_proj_bias
            qkv = F.linear(block.ln_1(x), *projection).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in qkv)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + attention.out_proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return backbone.ln_final(x.flatten(0, 1)[ends]) @ backbone.text_projection


def _logits(rows, columns, ids) -> torch.Tensor:
    """Products of rows and columns [N, N], without equal texts among the negatives."""
    same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    return (rows @ columns.T).masked_fill(same, -math.inf)


def _match(boxes, target, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(image, region, query) of every matched region, in the order of the mask, by SciPy on the host."""
    with torch.no_grad():
        pred, real = boxes[:, :, None].float(), target[:, None]
        cost = 5 * (pred - real).abs().sum(-1) - 2 * _giou(pred, real)
    queries = []
    for matrix, real in zip(cost.cpu().numpy(), mask.numpy()):
        query, region = scipy.optimize.linear_sum_assignment(matrix[:, real])
        queries.append(query[region.argsort()])
    return *mask.nonzero(as_tuple=True), torch.from_numpy(np.concatenate(queries))


def _giou(a_cxcywh, b_cxcywh):
    """Generalised IoU (Rezatofighi et al. 2019)."""
    a, b = modeling._corners(a_cxcywh), modeling._corners(b_cxcywh)
    area = lambda box: (box[..., 2:] - box[..., :2]).prod(-1)
    inner = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    overlap, hull = inner.clamp(min=0).prod(-1), outer.clamp(min=0).prod(-1)
    union = area(a) + area(b) - overlap
    return overlap / union - (hull - union) / hull
