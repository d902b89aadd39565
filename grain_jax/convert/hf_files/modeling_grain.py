"""GRAIN in PyTorch: an image tower and a text tower, with a region decoder or without.

Halbe et al., "Grounding Descriptions in Images informs Zero-Shot Visual Recognition", WACV 2026.
Parameters have the names of the authors' PyTorch code, under `backbone.` and `decoder.`. Letters in shapes:
B images, N texts, L tokens, Q region queries, D embedding, C classes, R target regions.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .configuration_grain import GrainConfig


def _attend(q, k, v, heads, *, causal=False, mask=None, dropout=0.0):
    """Multi-head attention of projected queries [B, Lq, E] to keys and values [B, Lk, E] -> [B, Lq, E].

    `mask`, bool [B, 1, 1, Lk]: the keys that are seen; None: all.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def _leading(tower):
    """The number of tokens before the patches: the class token and the registers."""
    return int(tower["class_token"]) + tower["registers"]


def _grid(tower):
    return tower["image_size"] // tower["patch_size"]


def _centres(grid, **kind):
    """The centres of the patches in [0, 1]: y and x, [patches] each."""
    centres = (torch.arange(grid, **kind) + 0.5) / grid
    return [a.flatten() for a in torch.meshgrid(centres, centres, indexing="ij")]


def _turned(x, tower):
    """Queries or keys [B, tokens, E] with the rotary positions of DINOv3 or PE; leading tokens have none.

    DINOv3: a patch's centre in [-1, 1] times 2 pi. PE: its row and column, from 1, on the trained grid.
    Channel i turns with i + half, in float32.
    """
    head_dim, leading = tower["width"] // tower["heads"], _leading(tower)
    quarter = torch.arange(head_dim // 4, dtype=torch.float64)  # on the CPU: some devices have no float64
    waves = tower["rope_theta"] ** -(quarter / len(quarter))
    places = [2 * math.pi * (2 * a - 1) for a in _centres(_grid(tower), dtype=torch.float64)]
    if tower["rope"] == "indices":
        scale, half = tower["rope_grid"], tower["rope_grid"] / _grid(tower) / 2
        places = [a * scale + half for a in _centres(_grid(tower), dtype=torch.float64)]
    angles = torch.cat([a[:, None] * waves for a in places] * 2, dim=-1)
    cos, sin = (table.float().to(x.device).unsqueeze(-2) for table in (angles.cos(), angles.sin()))
    heads = x.unflatten(-1, (-1, head_dim))
    patches = heads[:, leading:].float()
    first, second = patches.chunk(2, dim=-1)
    turned = (patches * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
    return torch.cat([heads[:, :leading], turned], dim=1).flatten(-2)


def _norm(tower):
    return nn.LayerNorm(tower["width"], eps=tower["norm_eps"])


class ImageAttention(nn.Module):
    """Self-attention; with `qk_norm`, a LayerNorm on the queries and keys of each head."""

    def __init__(self, tower):
        super().__init__()
        width, self.heads, self.tower = tower["width"], tower["heads"], tower
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        norm = lambda: nn.LayerNorm(width // self.heads, eps=tower["norm_eps"])
        self.q_norm, self.k_norm = (norm() if tower["qk_norm"] else nn.Identity() for _ in range(2))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if not self.tower["key_bias"]:
            k = k - self.qkv.bias.chunk(3)[1]  # zeros, also after training
        q = self.q_norm(q.unflatten(-1, (self.heads, -1))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (self.heads, -1))).flatten(-2)
        if self.tower["rope"] != "none":
            q, k = _turned(q, self.tower), _turned(k, self.tower)
        return self.proj(_attend(q, k, v, self.heads))


class Attention(nn.Module):
    """Attention with one matrix for the three input projections; names as in nn.MultiheadAttention."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query, key, value, *, causal=False, mask=None):
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
        dropout = self.dropout if self.training else 0.0
        out = _attend(q, k, v, self.heads, causal=causal, mask=mask, dropout=dropout)
        return self.out_proj(out)


class MLP(nn.Module):
    """Two linear layers, named `names`, with an activation between; `gated` multiplies by a third layer."""

    def __init__(self, tower, names, gated=False):
        super().__init__()
        width, mlp_dim, activation = tower["width"], tower["mlp_dim"], tower["activation"]
        self.names = names
        self.activation = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)]
        self.add_module(names[0], nn.Linear(width, mlp_dim))
        self.add_module(names[1], nn.Linear(mlp_dim, width))
        self.gate = nn.Linear(width, mlp_dim) if gated else None

    def forward(self, x):
        first, second = (getattr(self, name) for name in self.names)
        x = self.activation(first(x)) if self.gate is None else self.activation(self.gate(x)) * first(x)
        return second(x)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens: the MAP head of SigLIP."""

    def __init__(self, tower):
        super().__init__()
        width = tower["width"]
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = Attention(width, tower.get("pool_heads") or tower["heads"])
        self.norm, self.mlp = _norm(tower), MLP(tower, ("fc1", "fc2"))

    def forward(self, tokens, mask=None):
        """[B, tokens, E] -> [B, E], of the tokens where the mask, bool [B, 1, 1, tokens], is true."""
        x = self.attention(self.probe.expand(tokens.shape[0], -1, -1), tokens, tokens, mask=mask)
        return (x + self.mlp(self.norm(x)))[:, 0]


def _projection(tower, out):
    """The matrix and the bias of a projection "none", "matrix" or "affine"; None for what it lacks."""
    kind = tower["projection"]
    matrix = None if kind == "none" else nn.Parameter(torch.zeros(tower["width"], out))
    return matrix, nn.Parameter(torch.zeros(out)) if kind == "affine" else None


def _projected(x, matrix, bias):
    x = x if matrix is None else x @ matrix
    return x if bias is None else x + bias


class ImageBlock(nn.Module):
    """Pre-norm attention and MLP; maybe layer scale."""

    def __init__(self, tower):
        super().__init__()
        self.norm1, self.norm2 = _norm(tower), _norm(tower)
        self.attn = ImageAttention(tower)
        self.mlp = MLP(tower, ("fc1", "fc2"), gated=tower["mlp"] == "gated")
        scale = lambda: nn.Parameter(torch.full((tower["width"],), 1e-5)) if tower["layer_scale"] else 1.0
        self.ls1, self.ls2 = scale(), scale()

    def forward(self, x):
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class ImageTower(nn.Module):
    """A vision transformer; all of its tokens go on to the decoder, or to the pooling."""

    def __init__(self, tower):
        super().__init__()
        width, patch, leading = tower["width"], tower["patch_size"], int(tower["class_token"])
        self.image_size = tower["image_size"]
        tokens = lambda count: nn.Parameter(torch.zeros(1, count, width)) if count else None
        self.cls_token, self.reg_token = tokens(leading), tokens(tower["registers"])
        self.pos_embed = tokens(tower["positions"] * (_grid(tower) ** 2 + leading))
        patches = nn.Conv2d(3, width, patch, patch, bias=tower["patch_bias"])
        self.patch_embed = nn.ModuleDict({"proj": patches})
        self.norm_pre = _norm(tower) if tower["pre_norm"] else nn.Identity()
        self.blocks = nn.ModuleList(ImageBlock(tower) for _ in range(tower["depth"]))
        self.norm = _norm(tower)

    def forward(self, pixel_values):
        """[B, 3, S, S] -> [B, tokens, E]."""
        if pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values: got shape {list(pixel_values.shape)}, expected"
                f" [B, 3, {self.image_size}, {self.image_size}]; use the processor of this folder"
            )
        x = self.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.reg_token is not None:  # after the class token
            leading = int(self.cls_token is not None)
            registers = self.reg_token.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :leading], registers, x[:, leading:]], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextBlock(nn.Module):
    """Pre-norm attention, causal where the tower is, and MLP."""

    def __init__(self, tower):
        super().__init__()
        self.causal = tower["causal"]
        self.ln_1, self.ln_2 = _norm(tower), _norm(tower)
        self.attn = Attention(tower["width"], tower["heads"])
        self.mlp = MLP(tower, ("c_fc", "c_proj"))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, causal=self.causal, mask=mask)
        return x + self.mlp(self.ln_2(x))


class Backbone(nn.Module):
    """Both towers."""

    def __init__(self, towers):
        super().__init__()
        text = towers["text"]
        self.visual = ImageTower(towers["image"])
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.context = text["context_length"]
        self.positional_embedding = nn.Parameter(torch.zeros(self.context, text["width"]))
        blocks = nn.ModuleList(TextBlock(text) for _ in range(text["depth"]))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = _norm(text)
        self.text_pool = AttentionPool(text) if text["pool"] == "map" else None
        self.text_projection, self.text_projection_bias = _projection(text, towers["embed_dim"])
        self.pool, self.pad_id, self.end_id = text["pool"], text["pad_id"], text["end_id"]
        self.causal, self.mask_padding = text["causal"], text["mask_padding"]
        self.seeks_end = self.mask_padding or self.pool == "end"
        self.sees_padding = not (self.mask_padding or (self.causal and self.pool == "end"))
        # The logarithm of the scale.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(towers["logit_scale_init"])))
        self.logit_bias = None
        if towers["logit_bias_init"] is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(towers["logit_bias_init"])))

    def encode_text(self, input_ids):
        """Token ids [N, L] -> [N, D], read at the end token, at the last position, or pooled over all.

        The end token is the first `end_id`; None: the highest id; -1: the last before the padding. A tower
        that sees its padding gets texts filled to the context. With `mask_padding`, no position after the end
        token counts.
        """
        least = int(self.seeks_end)
        if input_ids.ndim != 2 or not least <= input_ids.shape[1] <= self.context:
            raise ValueError(
                f"input_ids: got shape {list(input_ids.shape)}, expected [N, {least} to {self.context}];"
                " the processor cuts texts to this length"
            )
        ids = input_ids
        if self.sees_padding:
            input_ids = F.pad(input_ids, (0, self.context - input_ids.shape[1]), value=self.pad_id)
        x = self.token_embedding(input_ids) + self.positional_embedding[: input_ids.shape[1]]
        real = mask = end = None
        if self.seeks_end:
            end = (ids if self.end_id is None else (ids == self.end_id).long()).argmax(dim=-1)
        if self.end_id == -1:
            end = ((ids != self.pad_id).sum(-1) - 1).clamp(0)
        if self.mask_padding:
            real = torch.arange(x.shape[1], device=x.device) <= end[:, None]
            mask = real[:, None, None]
        for block in self.transformer.resblocks:
            x = block(x, None if self.causal else mask)
        if end is not None and self.pool in ("end", "last"):
            x = x.gather(1, end[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
        elif self.pool == "last":
            x = x[:, -1]
        x = self.ln_final(x)
        if self.text_pool is not None:
            x = self.text_pool(x, mask)
        elif self.pool == "mean":
            x = x.mean(1) if real is None else (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return _projected(x, self.text_projection, self.text_projection_bias)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the image tokens, ReLU MLP."""

    def __init__(self, tower):
        super().__init__()
        width = tower["width"]
        self.self_attn = Attention(width, tower["heads"], tower["dropout"])
        self.multihead_attn = Attention(width, tower["heads"], tower["dropout"])
        self.linear1 = nn.Linear(width, tower["mlp_dim"])
        self.linear2 = nn.Linear(tower["mlp_dim"], width)
        self.norm1, self.norm2, self.norm3 = (_norm(tower) for _ in range(3))
        self.dropout = nn.Dropout(tower["dropout"])

    def forward(self, x, memory, positions):
        """x [B, Q+1, E], memory [B, tokens, E], positions [Q+1, E], added to queries and keys alone."""
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y + positions, y + positions, y))
        x = x + self.dropout(self.multihead_attn(self.norm2(x) + positions, memory, memory))
        hidden = self.dropout(F.relu(self.linear1(self.norm3(x))))
        return x + self.dropout(self.linear2(hidden))


class BoxHead(nn.Module):
    """Embeds boxes: the mean of the tokens in each of bins x bins parts of a box, projected."""

    def __init__(self, towers):
        super().__init__()
        head, image = towers["boxes"], towers["image"]
        self.leading, self.grid = _leading(image), _grid(image)
        self.bins, self.samples = head["bins"], head["samples"]
        self.proj = nn.Parameter(torch.zeros(image["width"] * self.bins**2, towers["embed_dim"]))

    def forward(self, tokens, boxes_xyxy):
        """Image tokens and boxes [B, R, 4], corners in [0, 1] -> [B, R, D].

        RoIAlign (He et al. 2017), aligned half-pixels: a bilinear sample is a product of two hat functions.
        """
        x1, y1, x2, y2 = boxes_xyxy.float().unbind(-1)
        features = tokens[:, self.leading :].unflatten(1, (self.grid, self.grid)).float()
        lines = torch.einsum("brih,bhwe->briwe", self._share_of_cells(y1, y2), features)
        parts = torch.einsum("brjw,briwe->brije", self._share_of_cells(x1, x2), lines)
        return parts.flatten(2).to(self.proj.dtype) @ self.proj

    def patches(self, tokens):
        """Image tokens -> an embedding of the box of each patch, [B, patches, D]."""
        y, x = _centres(self.grid, device=self.proj.device)
        side = torch.full_like(x, 1 / self.grid)
        cells = _corners(torch.stack([x, y, side, side], dim=-1))
        return self(tokens, cells.expand(tokens.shape[0], -1, -1))

    def _share_of_cells(self, start, end):
        """The share of every cell in every bin of start to end, [B, R] -> [B, R, bins, cells]."""
        count = self.bins * self.samples
        shares = (torch.arange(count, device=start.device) + 0.5) / count
        points = (start[..., None] + (end - start)[..., None] * shares) * self.grid - 0.5
        inside = (points >= -1) & (points <= self.grid)
        points = points.clamp(0, self.grid - 1)
        cells = torch.arange(self.grid, device=start.device)
        hats = (1 - (points[..., None] - cells).abs()).clamp(min=0) * inside[..., None]
        return hats.unflatten(-2, (self.bins, self.samples)).mean(-2)


class Pointer(nn.Module):
    """Each patch predicts a box and objectness; a query's box is the mean of those that it points at."""

    def __init__(self, towers):
        super().__init__()
        image, decoder = towers["image"], towers["decoder"]
        width = (decoder or image)["width"]
        self.leading, self.grid = _leading(image), _grid(image)
        self.layers = nn.ModuleList([nn.Linear(image["width"], width), nn.Linear(width, 5)])
        if decoder is not None:
            self.query = nn.Linear(width, width, bias=False)
            self.key = nn.Linear(image["width"], width, bias=False)

    def patches(self, tokens):
        """Image tokens -> boxes cxcywh [B, patches, 4] and the logits of "shows an object" [B, patches]."""
        first, second = self.layers
        hidden = second(F.relu(first(tokens[:, self.leading :])))
        offset, logit = hidden.float().split([4, 1], dim=-1)
        y, x = _centres(self.grid, device=tokens.device)
        side = torch.full_like(x, 0.38)
        boxes = (offset + torch.stack([x, y, side, side], dim=-1).logit()).sigmoid()
        return boxes, logit[..., 0]

    def forward(self, queries, tokens):
        """Queries [T, B, Q, E] and image tokens -> boxes cxcywh [T, B, Q, 4]."""
        boxes, logit = self.patches(tokens)
        keys = self.key(tokens[:, self.leading :])
        scores = torch.einsum("tbqe,bpe->tbqp", self.query(queries), keys).float()
        scores = scores * (6 * queries.shape[-1] ** -0.5) + logit[None, :, None]
        return torch.einsum("tbqp,bpc->tbqc", scores.softmax(-1), boxes)


class PooledImage(nn.Module):
    """The pooled tokens embed the image."""

    tower_pools = True

    def __init__(self, towers):
        super().__init__()
        image = towers["image"]
        self.kind, self.leading = image["pool"], _leading(image)
        self.pool = AttentionPool(image) if image["pool"] == "map" else None
        self.img_proj, self.img_proj_bias = _projection(image, towers["embed_dim"])
        self.boxes = BoxHead(towers) if towers["boxes"]["kind"] != "none" else None
        self.has_proposals = towers["boxes"].get("proposals", False)
        self.has_regions = self.has_proposals or (towers["decoder"] or {"queries": 0})["queries"] > 0
        self.object_weight = towers["boxes"].get("object_weight")
        self.logit_scale = self.logit_bias = None  # of regions
        if self.has_proposals:
            self.pointer = Pointer(towers)

    @property
    def embeds_patches(self):
        """Whether patches have embeddings."""
        return self.boxes is not None or self.tower_pools

    def forward(self, tokens):
        """Image tokens -> image [B, D], and no regions and no boxes."""
        return self._embed(tokens, self.leading), None, None

    def encode(self, tokens):
        """Image tokens -> images [B, D], unit length, and their `GrainRegions`, or None without regions."""
        image, embeds, boxes = self(tokens)
        if not self.has_regions:
            return _unit(image), None
        if self.has_proposals:
            boxes, logit = self.pointer.patches(tokens)
            corners, priors = _corners(boxes).clamp(0, 1), self.object_weight * F.logsigmoid(logit)
            embeds = self.boxes(tokens, corners)
        else:
            corners, priors = _corners(boxes[-1]).clamp(0, 1), embeds.new_zeros(embeds.shape[:2]).float()
        return _unit(image), GrainRegions(boxes_xyxy=corners, embeds=_unit(embeds), priors=priors)

    def patches(self, tokens):
        """Embeddings of the patches, [B, patches, D]: by the box head, or each pooled alone; None without."""
        if not self.embeds_patches:
            return None
        if self.boxes is not None:
            return self.boxes.patches(tokens)
        patches = tokens[:, self.leading :]
        return self._embed(patches.flatten(0, 1)[:, None], 0).unflatten(0, patches.shape[:2])

    def _embed(self, tokens, leading):
        if self.pool is not None:
            x = self.pool(tokens)
        else:
            x = tokens[:, 0] if self.kind == "class" else tokens[:, leading:].mean(dim=1)
        return _projected(x, self.img_proj, self.img_proj_bias)


class Decoder(PooledImage):
    """Learned queries attend to the image tokens.

    The whole image is embedded by the last query, by the sum of all, or as without a decoder.
    """

    def __init__(self, towers):
        super().__init__(towers)
        tower, out = towers["decoder"], towers["embed_dim"]
        width, pool = tower["width"], tower.get("image_pool", "query")
        self.queries = tower["queries"]
        self.tower_pools, self.sums_all = pool == "tower", pool == "all"
        self.proj = nn.Linear(towers["image"]["width"], width, bias=False)
        self.query_embed = nn.Embedding(tower["queries"] + (not self.tower_pools), width)
        layers = nn.ModuleList(DecoderLayer(tower) for _ in range(tower["depth"]))
        decoder = nn.ModuleDict({"layers": layers, "norm": _norm(tower)})
        self.transformer = nn.ModuleDict({"pre_norm": _norm(tower), "decoder": decoder})
        self.points, self.reads_box = tower.get("boxes") == "pointer", tower.get("reads_box")
        if self.points and not self.has_proposals:
            self.pointer = Pointer(towers)
        if not self.points:
            layers = nn.ModuleList(nn.Linear(width, n) for n in (width, width, 4))
            self.bbox_embed = nn.ModuleDict({"layers": layers})
        self.obj_proj = nn.Parameter(torch.zeros(width, out))
        if self.tower_pools:
            self.logit_scale = nn.Parameter(torch.zeros(()))
            if towers["logit_bias_init"] is not None:
                self.logit_bias = nn.Parameter(torch.zeros(()))
        else:
            self.img_proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, tokens):
        """Image tokens -> image [B, D], regions [B, Q, D], boxes cxcywh of every layer [T, B, Q, 4]."""
        memory = self.transformer.pre_norm(self.proj(tokens))
        positions = self.query_embed.weight
        x = memory.new_zeros(memory.shape[0], *positions.shape)
        hidden = []
        for layer in self.transformer.decoder.layers:
            x = layer(x, memory, positions)
            hidden.append(self.transformer.decoder.norm(x))
        queries = torch.stack(hidden)[:, :, : self.queries]
        if self.points:
            boxes = self.pointer(queries, tokens)
        else:
            first, second, last = self.bbox_embed.layers
            boxes = last(F.relu(second(F.relu(first(queries))))).float().sigmoid()
        regions = queries[-1] @ self.obj_proj
        if self.reads_box:
            regions = regions + self.boxes(tokens, _corners(boxes[-1]))
        if self.tower_pools:
            return self._embed(tokens, self.leading), regions, boxes
        image = hidden[-1][:, -1] @ self.img_proj
        if self.sums_all:
            image = _unit(image) + _unit(regions).sum(dim=1)
        return image, regions, boxes


@dataclass
class GrainRegions(ModelOutput):
    """The regions of the queries, or with proposals of all patches."""

    boxes_xyxy: torch.FloatTensor | None = None  # [B, Q, 4], corners in [0, 1]
    embeds: torch.FloatTensor | None = None  # [B, Q, D], unit length
    priors: torch.FloatTensor | None = None  # [B, Q], added to the cosines; 0 for queries


@dataclass
class GrainOutput(ModelOutput):
    """The outputs of `GrainModel.forward`; embeddings have unit length."""

    logits_per_image: torch.FloatTensor | None = None  # scaled cosines [B, N]
    logits_per_text: torch.FloatTensor | None = None  # [N, B]
    image_embeds: torch.FloatTensor | None = None  # [B, D]
    text_embeds: torch.FloatTensor | None = None  # [N, D]
    region_embeds: torch.FloatTensor | None = None  # [B, Q, D], of a model that finds regions, as the others
    boxes_xyxy: torch.FloatTensor | None = None  # [B, Q, 4], corners in [0, 1]
    region_priors: torch.FloatTensor | None = None  # [B, Q], with proposals


class GrainModel(PreTrainedModel):
    """Embeddings of images, texts and regions, and zero-shot scores."""

    config_class = GrainConfig
    base_model_prefix = "grain"
    main_input_name = "pixel_values"
    _no_split_modules = ["ImageBlock", "TextBlock", "DecoderLayer"]
    _supports_sdpa = True
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Backbone(config.towers)
        has_decoder = config.towers["decoder"] is not None
        self.decoder = (Decoder if has_decoder else PooledImage)(config.towers)
        self.post_init()

    def get_image_features(self, pixel_values):
        """Images [B, 3, S, S] -> [B, D], not normalised."""
        return self.decoder(self.backbone.visual(pixel_values))[0]

    def get_text_features(self, input_ids):
        """Token ids [N, L] -> [N, D], not normalised. A tower read at its end token ignores what follows."""
        return self.backbone.encode_text(input_ids)

    def get_regions(self, pixel_values):
        """Images [B, 3, S, S] -> `GrainRegions`; needs a region decoder or proposals."""
        return self._regions(self.backbone.visual(pixel_values))

    def _regions(self, tokens):
        """`get_regions` of the tokens of images."""
        regions = self.decoder.encode(tokens)[1]
        if regions is None:
            raise ValueError("the model has neither a region decoder nor proposals, so it finds no regions")
        return regions

    def ground(self, pixel_values, input_ids):
        """For each image and text the region with the best score: boxes_xyxy [B, N, 4], scores [B, N].

        A score is the cosine plus the prior. With a box head, its embedding of the box gives the cosine.
        """
        tokens = self.backbone.visual(pixel_values)
        boxes, embeds, priors = self._regions(tokens).values()
        if self.decoder.boxes is not None and not self.decoder.has_proposals:
            embeds = _unit(self.decoder.boxes(tokens, boxes))
        cosines = _cosines(embeds, _unit(self.get_text_features(input_ids)))  # [B, Q, N]
        score, best = (cosines + priors[..., None]).max(dim=1)
        return boxes.gather(1, best[..., None].expand(-1, -1, 4)), score

    def detect(self, pixel_values, input_ids, threshold=0.0, top_k=100):
        """For each image the regions with a text: (boxes_xyxy [n, 4], scores [n], labels [n]), best first.

        A score is the softmax over the texts of the scaled cosines, times the exponential of the scaled
        prior; a single text has its cosine plus the prior. Regions of one text overlap by an IoU of at
        most 0.5.
        """
        boxes, embeds, priors = self._regions(self.backbone.visual(pixel_values)).values()
        cosines = _cosines(embeds, _unit(self.get_text_features(input_ids)))
        of_regions = self.decoder.logit_scale
        scale = (self.backbone.logit_scale if of_regions is None else of_regions).exp()
        scores = cosines + priors[..., None]
        if cosines.shape[-1] > 1:
            shares = (scale * cosines).double().softmax(-1)
            scores = (shares * (scale * priors).double().exp()[..., None]).float()
        low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
        high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
        both = (high - low).clamp(min=0).prod(-1)
        area = both.diagonal(dim1=1, dim2=2)
        covers = both > 0.5 * (area[:, :, None] + area[:, None] - both)  # [B, Q, Q]
        detections = []
        for box, score, covered in zip(boxes, scores, covers):
            kept = torch.zeros_like(score, dtype=torch.bool)
            texts = torch.arange(score.shape[1], device=score.device)
            for best in score.argsort(dim=0, descending=True, stable=True):  # of each text
                kept[best, texts] = ~(covered[best] & kept.T).any(1)
            region, label = (kept & (score >= threshold)).nonzero(as_tuple=True)
            order = score[region, label].argsort(descending=True, stable=True)[:top_k]
            region, label = region[order], label[order]
            detections.append((box[region], score[region, label], label))
        return detections

    def get_boxes(self, pixel_values, boxes_xyxy):
        """Images [B, 3, S, S] and boxes [B, R, 4], corners in [0, 1] -> embeddings [B, R, D], unit length."""
        if self.decoder.boxes is None:
            raise ValueError("the model has no box head: it was trained without loss.box_description")
        return _unit(self.decoder.boxes(self.backbone.visual(pixel_values), boxes_xyxy))

    def similarity_maps(self, pixel_values, input_ids):
        """Where texts lie: a cosine for each patch, [B, N, h, w].

        A patch has the best cosine of the regions there. With a box head, it has the mean with its own cosine
        as a box. Without a region decoder, it has its own cosine alone.
        """
        return self._maps(pixel_values, _unit(self.get_text_features(input_ids)))

    def _maps(self, pixel_values, texts):
        """`similarity_maps` of texts [N, D], unit length."""
        tokens = self.backbone.visual(pixel_values)
        regions = self.decoder.encode(tokens)[1]
        grid, maps = _grid(self.config.towers["image"]), []
        if regions is not None:
            boxes, embeds, priors = regions.values()
            maps.append(_region_maps(_cosines(texts, embeds) + priors[:, None], boxes, grid))
        patches = self.decoder.patches(tokens)
        if patches is not None:
            maps.append(_cosines(texts, _unit(patches)).unflatten(-1, (grid, grid)))
        if not maps:
            raise ValueError("the model has neither regions nor a box head, expected either")
        return torch.stack(maps).mean(0)

    def zero_shot_logits(self, pixel_values, class_features, descriptions=None, alpha=1.0):
        """Scores of every class, [B, C]: alpha * global + (1 - alpha) * region cosines.

        Args:
          pixel_values: [B, 3, S, S].
          class_features: [C, D], as `class_features` returns; not normalised again.
          descriptions: for each class the features [n, D] of its descriptions; alpha < 1 needs them.
          alpha: weight of the global score.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: got {alpha}, expected a number from 0 to 1")
        image, regions = self.decoder.encode(self.backbone.visual(pixel_values))
        scores = alpha * _cosines(image, class_features)
        if alpha < 1:
            if descriptions is None or regions is None:
                raise ValueError(f"alpha {alpha} needs a model with regions, and descriptions of classes")
            # Over descriptions and regions: the maximum over one, the mean over the other.
            decoder, by_best = self.config.towers["decoder"], self.decoder.has_proposals
            by_best = by_best or decoder.get("class_score") == "best"
            _, embeds, priors = regions.values()
            cosines = (_cosines(embeds, _unit(d)) + priors[..., None] for d in descriptions)
            best = [x.amax(1 if by_best else 2).mean(1) for x in cosines]
            scores = scores + (1 - alpha) * torch.stack(best, dim=1)
        return scores

    def class_features(self, input_ids):
        """For each class the token ids of its texts, [n, L] -> [C, D], ready for `zero_shot_logits`."""
        return torch.stack([_unit(self.get_text_features(ids)).mean(0) for ids in input_ids])

    def forward(self, pixel_values, input_ids):
        """Images [B, 3, S, S] and texts [N, L] -> `GrainOutput`."""
        image, regions = self.decoder.encode(self.backbone.visual(pixel_values))
        text = _unit(self.get_text_features(input_ids))
        logits = self.backbone.logit_scale.exp() * _cosines(image, text)
        if self.backbone.logit_bias is not None:
            logits = logits + self.backbone.logit_bias
        out = GrainOutput(
            logits_per_image=logits, logits_per_text=logits.T, image_embeds=image, text_embeds=text
        )
        if regions is not None:
            out["region_embeds"], out["boxes_xyxy"] = regions.embeds, regions.boxes_xyxy
            if self.decoder.has_proposals:
                out["region_priors"] = regions.priors
        return out

    def export_onnx(self, folder):
        """Makes `folder` with `image.onnx`, `text.onnx`, `maps.onnx` and, with a box head, `boxes.onnx`.

        image.onnx: pixel_values -> image_embeds, with regions region_embeds and boxes_xyxy, and with
        proposals region_priors.
        text.onnx: input_ids [N, context length] -> text_embeds. boxes.onnx: pixel_values, boxes_xyxy [B, R,
        4] -> box_embeds. maps.onnx: pixel_values, text_embeds [N, D] -> similarity_maps [B, N, h, w]. The
        numbers of images, texts and boxes are dynamic. Needs the packages onnx and onnxscript.
        """
        image, text = self.config.towers["image"], self.config.towers["text"]
        size, visual, decoder = image["image_size"], self.backbone.visual, self.decoder
        batch, boxes, texts = (torch.export.Dim(name) for name in ("batch", "boxes", "texts"))
        pixels = {"pixel_values": (torch.zeros(2, 3, size, size), {0: batch})}
        ids = {"input_ids": (torch.zeros(2, text["context_length"], dtype=torch.long), {0: batch})}
        corners = {"boxes_xyxy": (torch.rand(2, 3, 4), {0: batch, 1: boxes})}
        asked = {"text_embeds": (torch.rand(3, self.config.towers["embed_dim"]), {0: texts})}
        embeds = ["image_embeds", "region_embeds", "boxes_xyxy", "region_priors"]
        embeds = embeds[: 4 if decoder.has_proposals else 3 if decoder.has_regions else 1]

        def of_images(pixel_values):
            image, regions = decoder.encode(visual(pixel_values))
            if regions is None:
                return image
            return (image, regions.embeds, regions.boxes_xyxy, regions.priors)[: len(embeds)]

        of_texts = lambda input_ids: _unit(self.backbone.encode_text(input_ids))
        parts = {  # file -> function, the modules that it calls, inputs, outputs
            "image": (of_images, (visual, decoder), pixels, embeds),
            "text": (of_texts, (self.backbone,), ids, ["text_embeds"]),
        }
        if decoder.boxes is not None:
            modules = (visual, decoder.boxes)
            parts["boxes"] = (self.get_boxes, modules, pixels | corners, ["box_embeds"])
        if decoder.has_regions or decoder.embeds_patches:
            parts["maps"] = (self._maps, (visual, decoder), pixels | asked, ["similarity_maps"])
        Path(folder).mkdir(parents=True, exist_ok=True)
        trains = self.training
        for name, (function, modules, inputs, outputs) in parts.items():
            torch.onnx.export(
                Part(function, modules).eval(),
                tuple(example.to(self.device) for example, _ in inputs.values()),
                f"{folder}/{name}.onnx",
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=(tuple(dims for _, dims in inputs.values()),),
                dynamo=True,
                verbose=False,
            )
        self.train(trains)


class Part(nn.Module):
    """A function of some modules, as a module with their parameters, which the exporter asks for."""

    def __init__(self, function, modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *inputs):
        return self.function(*inputs)


def _unit(x):
    return F.normalize(x.float(), dim=-1)


def _cosines(rows, columns):
    """Cosines [..., n, m] of unit vectors [..., n, D] and [..., m, D], in float32 also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.mT


def _corners(boxes_cxcywh):
    """Boxes as centre and size -> corners."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _region_maps(cosines, boxes_xyxy, grid):
    """Cosines [B, N, Q] of texts and regions, and their boxes [B, Q, 4] -> [B, N, grid, grid].

    A cell has the best cosine of the regions there; one that covers a share of the cell counts in that share,
    above the lowest cosine of the text.
    """
    low = torch.arange(grid, device=cosines.device) / grid

    def covered(first, last):  # [B, Q] each -> [B, Q, grid]
        ends = last[..., None].minimum(low + 1 / grid) - first[..., None].maximum(low)
        return (ends * grid).clamp(0, 1)

    x1, y1, x2, y2 = boxes_xyxy.float().unbind(-1)
    share = covered(y1, y2)[..., :, None] * covered(x1, x2)[..., None, :]  # [B, Q, grid, grid]
    lowest = cosines.amin(-1, keepdim=True)
    above = ((cosines - lowest)[..., None, None] * share[:, None]).amax(2)
    return lowest[..., None] + above
