"""The data card of a folder of embeddings: what is in it, what it is made of, how to read it."""

from collections.abc import Sequence

import jax

from grain_jax import __version__
from grain_jax.core import printable
from grain_jax.data.embed import embeddings

_REGIONS = """\
| `region_embed` | list of `{stored}[{dim}]` | embeddings of its regions, unit length |
| `boxes_xyxy` | list of `float[4]` | their boxes x1, y1, x2, y2, as shares of width and height, 0 to 1 |
"""


def text(settings: embeddings.Settings, parts: Sequence[embeddings.Part], folder: str) -> str:
    """The card, in Markdown.

    Args:
      settings: what they are made of.
      parts: all of them.
      folder: as it was given.
    """
    rows, faults = sum(p.rows for p in parts), sum(len(p.faults) for p in parts)
    stored, dim = settings.store, settings.embed_dim
    regions = _REGIONS.format(stored=stored, dim=dim) if settings.regions else ""
    source = settings.source
    plain = lambda value: printable.plain(str(value), 300)
    split = f", split {plain(source.split)}" if source.split else ""
    return f"""---
configs:
- config_name: default
  data_files: data/*.parquet
---
# Embeddings of {rows:,} images

Written by `grain-jax embed` (grain_jax {__version__}, jax {jax.__version__}). {len(parts):,} Parquet files
in `data/`; {faults:,} images were left out, and `faults.jsonl` names each with its cause.

| | |
|---|---|
| source | `{plain(source.path)}` ({source.kind}{split}), digest {source.digest} |
| model | `{plain(settings.checkpoint)}`, digest of its parameters {settings.model.params} |
| image size | {settings.image_size} pixels a side, resized without keeping the aspect ratio |
| orientation | {settings.orientation} (exif: as a viewer shows the image; file: as its pixels are stored) |
| activations | {settings.dtype} |

| column | type | what |
|---|---|---|
| `id` | string | the id of the annotations or the record; else the path |
| `path` | string | of the image below the source; of a tar `TAR/MEMBER`, of a record set its split and number |
| `width`, `height` | int32 | pixels of the image |
| `image_embed` | `{stored}[{dim}]` | embedding of the whole image, unit length |
{regions}
```python
import numpy as np
import pyarrow.dataset

for batch in pyarrow.dataset.dataset("data").to_batches(columns=["id", "image_embed"]):
    image_embed = batch["image_embed"].flatten().to_numpy(zero_copy_only=False).reshape(-1, {dim})
```

A dot product with the embedding of a text by the same model is their cosine:
`grain-jax search {plain(folder)} --text "a long orange beak"`.
"""
