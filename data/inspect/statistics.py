"""The numbers of a set, collected in one pass in bounded memory, and the problems that they show."""

import collections
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from grain_jax.core import images
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data.annotate import answers
from grain_jax.data.sources import base
from grain_jax.input_pipeline import tokenizer

LONGEST = 256  # tokens; longer texts count as this long
KINDS = {"web": 77, "synthetic": 77, "description": 24}  # of texts, with the tokens that are usual
TINY = 0.001  # share of the image: 7 x 7 pixels of 224 x 224, a fifth of a patch
WHOLE = 0.95  # share of the image
COMMON = 0.1  # a text is a problem if it is in more of the images
MOST_HELD = 250_000  # copies are sought among this number of different texts or images

COPIES = "images that are copies, byte by byte, of earlier ones"
# Problem -> advice; faults and texts that are too long have others.
_ADVICE = {
    "images without any caption": "nothing, if they have regions: the caption loss leaves them out",
    "images without regions": "nothing, if you know it: they train the caption loss alone",
    "refusals of a model": "run the model's pass again for these, or take the text out",
    f"boxes under {TINY:.1%} of their image": "drop them: at 224 pixels they are less than 7 x 7",
    base.ALL_SHARES: f"pixels are expected; {base.AS_SHARES}",
    f"boxes of {WHOLE:.0%} of their image or more": "drop them if the text is of a part",
    COPIES: "drop them, or merge their texts into one line",
}


class Statistics:
    """Call `add` with batches of items, then `result`."""

    def __init__(self):
        self.images = self.image_bytes = self.turned = self.regions = 0
        self.issues: dict[str, tuple[int, str]] = {}  # problem -> its count and its first example
        self.sizes: collections.Counter[str] = collections.Counter()
        self.digests: set[bytes] = set()  # of images
        self.tokens = {kind: collections.Counter[int]() for kind in KINDS}
        self.texts = {kind: collections.Counter[str]() for kind in KINDS}  # an image counts once for each
        self._tokenizer = tokenizer.ClipTokenizer()

    def _note(self, problem: str, example: str) -> None:
        count, first = self.issues.get(problem, (0, example))
        self.issues[problem] = count + 1, first

    def add(self, items: Sequence[Annotation | Fault]) -> list[Annotation]:
        """Counts items, fastest with a few hundred at a time; returns the images that can be read."""
        headers = []  # of the images that can be read
        for item in items:
            faults = [item]
            if isinstance(item, Annotation):
                faults = [*item.left_out]
                try:
                    headers.append((item, images.header(item.encoded)))
                except images.ImageError as error:
                    faults.append(Fault(item.image, "image", str(error)))
            for fault in faults:
                self._note(f"faulty: {fault.cause}", f"{fault.where or fault.image}: {fault.detail}")
        texts = [texts_of(item) for item, _ in headers]
        flat = [text for of_image in texts for _, text in of_image]
        lengths = iter(self._tokenizer.encode(flat, LONGEST).lengths.tolist() if flat else ())
        for (item, header), of_image in zip(headers, texts, strict=True):
            where = item.where or item.image
            self.images += 1
            self.image_bytes += len(item.encoded)
            self.turned += header.turned
            self.sizes[f"{header.size[0]} x {header.size[1]}"] += 1
            digest = hashlib.blake2b(item.encoded, digest_size=8).digest()
            if digest in self.digests:
                self._note(COPIES, where)
            elif len(self.digests) < MOST_HELD:
                self.digests.add(digest)
            self._add_texts(where, of_image, list(itertools.islice(lengths, len(of_image))))
            self._add_regions(item, header.size, where)
        return [item for item, _ in headers]

    def _add_texts(self, where: str, texts: list[tuple[str, str]], lengths: list[int]) -> None:
        for (kind, text), tokens in zip(texts, lengths, strict=True):
            self.tokens[kind][tokens] += 1
            example = f"{where}: {text[:90]!r}"
            if tokens > KINDS[kind]:
                self._note(f"{kind} texts over {KINDS[kind]} tokens", example)
            # No model wrote web texts.
            if kind != "web" and answers.is_refusal(tokenizer.clean(text)):
                self._note("refusals of a model", example)
        for kind, plain in dict.fromkeys((kind, tokenizer.clean(text).lower()) for kind, text in texts):
            if plain in self.texts[kind] or len(self.texts[kind]) < MOST_HELD:
                self.texts[kind][plain] += 1
        if not any(kind != "description" for kind, _ in texts):
            self._note("images without any caption", where)

    def _add_regions(self, item: Annotation, size: tuple[int, int], where: str) -> None:
        self.regions += len(item.regions)
        if not item.regions:
            self._note("images without regions", where)
        for region in item.regions:
            x1, y1, x2, y2 = region.box_xyxy
            area = (x2 - x1) * (y2 - y1) / (size[0] * size[1])
            box = f"{where}: {region.description[:90]!r}, [{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
            if max(region.box_xyxy) <= base.LARGEST_SHARE:
                self._note(base.ALL_SHARES, box)
            if area < TINY:
                self._note(f"boxes under {TINY:.1%} of their image", box)
            elif area >= WHOLE:
                self._note(f"boxes of {WHOLE:.0%} of their image or more", box)

    def problems(self) -> list[dict[str, Any]]:
        """what, count, example and advice of all problems; faults come first."""
        out = []
        for what, (count, example) in self.issues.items():
            advice = _ADVICE.get(what, "shorten them if many: training cuts long captions")
            if what.startswith("faulty: "):
                advice = "fix them: grain-jax build leaves such lines out"
            if what != base.ALL_SHARES or count == self.regions:
                out.append(dict(what=what, count=count, example=example, advice=advice))
        out.sort(key=lambda problem: not problem["what"].startswith("faulty: "))
        for kind, texts in self.texts.items():
            for text, count in texts.most_common(1):
                if count > max(1, COMMON * self.images):
                    what = f"images that share one {kind} text (over {COMMON:.0%} of all)"
                    advice = "drop it if it is a placeholder, or repeats the model's prompt"
                    out.append(dict(what=what, count=count, example=repr(text), advice=advice))
        return out

    def result(self, path: str, total: int) -> dict[str, Any]:
        """All numbers of the set at `path`, which claims `total` images, as JSON can hold them."""
        return {
            "set": {"path": path},
            "images": {
                "count": self.images,
                "left_out": total - self.images,
                "bytes": self.image_bytes,
                "turned": self.turned,
                "sizes": list(map(list, self.sizes.most_common(3))),
            },
            "texts": {kind: _of_tokens(counts) for kind, counts in self.tokens.items()},
            "regions": {"count": self.regions},
            "problems": self.problems(),
        }


def _of_tokens(counts: collections.Counter[int]) -> dict[str, float]:
    """The number of texts; if there are some, the mean of their tokens, and the most that 99% have."""
    if not counts:
        return {"count": 0}
    lengths, numbers = np.array(sorted(counts.items())).T
    ends, total = np.cumsum(numbers), counts.total()
    p99 = lengths[np.searchsorted(ends, 0.99 * total)]
    return {"count": total, "mean_tokens": float((lengths * numbers).sum() / total), "p99_tokens": int(p99)}


def texts_of(item: Annotation) -> list[tuple[str, str]]:
    """(kind, text) of all texts; an empty synthetic caption means that there is none."""
    return [
        *(("web", text) for text in item.captions),
        *(("synthetic", text) for text in (item.synthetic_caption,) if text),
        *(("description", region.description) for region in item.regions),
    ]
