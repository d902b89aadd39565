"""Images and texts read by a torch DataLoader.

Texts are padded to 77, and the five regions of the highest score of an image are kept.
"""

import json
import random
from collections.abc import Sequence
from typing import Any

import open_clip
import PIL.Image
import torch
import torchvision
from etils import epath
from torchvision.transforms import v2

from benchmarks import made
from grain_jax.core import schema

MAX_REGIONS = 5


def loader(folder: epath.Path, kind: str) -> torch.utils.data.DataLoader:
    """An endless DataLoader of 2 workers of `Images`."""
    dataset = Images(folder, kind)
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=1 << 40)
    workers = dict(num_workers=made.WORKERS, persistent_workers=True, collate_fn=collate)
    return torch.utils.data.DataLoader(dataset, made.BATCH, sampler=endless, **workers)


class Images(torch.utils.data.Dataset):
    """The images that `A.jsonl` in `folder` names.

    Args:
      folder: a folder with A.jsonl and the folder `images`.
      kind: "PIL" (float32, normalised, as in the reference) or "torchvision" (uint8).
    """

    def __init__(self, folder: epath.Path, kind: str):
        self._folder, self._size = folder / "images", (made.SIZE, made.SIZE)
        self._lines = [json.loads(line) for line in (folder / "A.jsonl").read_text().splitlines()]
        self._tokenize = open_clip.SimpleTokenizer()
        self._read = {"PIL": self._by_pil, "torchvision": self._by_torchvision}[kind]
        self._transform = torchvision.transforms.Compose(
            [
                torchvision.transforms.Resize(self._size, v2.InterpolationMode.BICUBIC),
                torchvision.transforms.ToTensor(),
                torchvision.transforms.Normalize(schema.IMAGE_MEAN, schema.IMAGE_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        line = self._lines[index]
        image, (height, width) = self._read(str(self._folder / line["image"]))
        regions = sorted(line["regions"], key=lambda region: -region["score"])[:MAX_REGIONS]
        caption = line[random.choice(("caption", "synthetic_caption"))]
        boxes = torch.zeros(MAX_REGIONS, 4)
        if regions:
            corners = torch.tensor([region["box"] for region in regions])
            corners = corners / torch.tensor([width, height, width, height])
            boxes[: len(regions)] = torchvision.ops.box_convert(corners, "xyxy", "cxcywh")
        return {
            "image": image,
            "tokens": self._tokenize([caption, *(region["description"] for region in regions)]),
            "boxes": boxes,
            "mask": torch.arange(MAX_REGIONS) < len(regions),
        }

    def _by_pil(self, path: str):
        with PIL.Image.open(path, formats=["JPEG"]) as image:
            return self._transform(image.convert("RGB")), (image.height, image.width)

    def _by_torchvision(self, path: str):
        encoded = torchvision.io.read_file(path)
        image = torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB)
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.functional.resize(image, self._size, bicubic, antialias=True), image.shape[1:]


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch; its texts are concatenated, for each image the caption first."""
    out = {key: torch.stack([e[key] for e in examples]) for key in ("image", "boxes", "mask")}
    return out | {"tokens": torch.cat([e["tokens"] for e in examples])}
