"""Collects the numbers of a set in one pass, in bounded memory; `result` returns the content of statistics.json."""

import collections
import hashlib
import itertools
import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from grain_jax.core import images
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data.annotate import answers
from grain_jax.input_pipeline import tokenizer

ROW_LENGTH = 77  # tokens of a row in CLIP; training cuts longer texts
LONG_DESCRIPTION = 24  # tokens; descriptions have 4 to 12
LONGEST = 256  # tokens; longer texts count as this long
TINY = 0.001  # share of the image: 7 x 7 pixels of 224 x 224, a fifth of a patch
WHOLE = 0.95  # share of the image
TOP = 3  # most frequent texts and sizes
MOST_HELD = 250_000  # copies are sought among this number of different texts or images
_LEFTOVER = re.compile(
    r"[-*\u2022\u00b7#>]\s|\(?\d{1,2}[.):]\s|\*\*|(?:sure|certainly|of course)[,!]|here (?:are|is) "
    r"|(?:caption|description|subject|answer)s?\s*:"
)


class Numbers(collections.Counter[int]):
    """Exact statistics of integers with few different values."""

    def result(self) -> dict[str, Any]:
        """count; if there are some: mean, min, median, p99, max."""
        if not self:
            return {"count": 0}
        values, counts = np.array(sorted(self.items())).T
        ends, total = np.cumsum(counts), int(counts.sum())
        shares = dict(min=0.0, median=0.5, p99=0.99, max=1.0)
        quantiles = {k: int(values[np.searchsorted(ends, x * total)]) for k, x in shares.items()}
        return {"count": total, "mean": float((values * counts).sum() / total), **quantiles}


class Copies:
    """Counts items that occur several times, among the first MOST_HELD different ones."""

    def __init__(self):
        self.total = self.copies = 0
        self.example = ""  # a copy, and what it is a copy of
        self.held: dict[Hashable, list] = {}  # item -> [count, where it is first]

    def add(self, item: Hashable, where: str) -> None:
        """Counts an item; `where` names it."""
        self.total += 1
        if item in self.held:
            self.copies += 1
            self.held[item][0] += 1
            self.example = self.example or f"{where} is {self.held[item][1]}"
        elif len(self.held) < MOST_HELD:
            self.held[item] = [1, where]

    def result(self) -> dict[str, Any]:
        """total, different (of those that were held), copies, example."""
        numbers = {"total": self.total, "different": len(self.held), "copies": self.copies}
        return {**numbers, "example": self.example}

    def top(self, number: int) -> list[list]:
        """The `number` most frequent items as [item, count]."""
        counts = collections.Counter({item: count for item, (count, _) in self.held.items()})
        return list(map(list, counts.most_common(number)))


class TextStatistics:
    """What is counted about the texts of a kind."""

    def __init__(self):
        self.tokens, self.copies = Numbers(), Copies()
        self.images = 0  # that have some

    def result(self) -> dict[str, Any]:
        """The results, for statistics.json; in `copies` an image counts once for each different text."""
        counted = {"tokens": self.tokens.result(), "copies": self.copies.result()}
        return {"images": self.images, **counted, "most_frequent": self.copies.top(TOP)}


class Statistics:
    """Call `add` with batches of items, then `result`.

    `issues` has possible problems by name (see `problems`), each with its count and its first example; the names of
    faults are `fault: CAUSE`.
    """

    def __init__(self):
        self.issues: dict[str, tuple[int, str]] = {}
        self.images = self.image_bytes = self.turned = 0
        self.sizes, self.copies = Copies(), Copies()
        self.area, self.regions = Numbers(), Numbers()
        self.texts = {kind: TextStatistics() for kind in ("web", "synthetic", "description")}
        self._tokenizer = tokenizer.ClipTokenizer()

    def _note(self, issue: str, example: str) -> None:
        count, first = self.issues.get(issue, (0, example))
        self.issues[issue] = count + 1, first

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
                self._note(f"fault: {fault.cause}", f"{fault.where or fault.image}: {fault.detail}")
        texts = [texts_of(item) for item, _ in headers]
        flat = [text for of_image in texts for _, text in of_image]
        lengths = iter(self._tokenizer.encode(flat, LONGEST).lengths.tolist() if flat else ())
        for (item, header), of_image in zip(headers, texts, strict=True):
            where = item.where or item.image
            self._add_image(item, header, where)
            self._add_texts(where, of_image, list(itertools.islice(lengths, len(of_image))))
            self._add_regions(item, header.size, where)
        return [item for item, _ in headers]

    def _add_image(self, item: Annotation, header: images.Header, where: str) -> None:
        self.images += 1
        self.image_bytes += len(item.encoded)
        self.turned += header.turned
        self.sizes.add(f"{header.size[0]} x {header.size[1]}", where)
        digest = hashlib.blake2b(item.encoded, digest_size=8).digest()
        self.copies.add(digest, item.id or item.image)

    def _add_texts(self, where: str, texts: list[tuple[str, str]], lengths: list[int]) -> None:
        seen: dict[str, dict[str, None]] = {kind: {} for kind in self.texts}
        for (kind, text), tokens in zip(texts, lengths, strict=True):
            plain = tokenizer.clean(text).lower()
            name = "description" if kind == "description" else f"{kind} caption"
            if kind == "description" and plain in seen[kind]:
                self._note("repeated description", f"{where}: {text!r}")
            seen[kind][plain] = None
            self.texts[kind].tokens[tokens] += 1
            for issue in flaws(kind, plain, tokens):
                self._note(f"{issue} {name}", f"{where}: {text[:90]!r}")
        for kind, different in seen.items():
            self.texts[kind].images += bool(different)
            for text in different:
                self.texts[kind].copies.add(text, where)
        if not seen["web"] and not seen["synthetic"]:
            self._note("no caption", where)

    def _add_regions(self, item: Annotation, size: tuple[int, int], where: str) -> None:
        self.regions[len(item.regions)] += 1
        if not item.regions:
            self._note("no region", where)
        for region in item.regions:
            x1, y1, x2, y2 = region.box_xyxy
            area = (x2 - x1) * (y2 - y1) / (size[0] * size[1])
            box = f"{where}: {region.description[:90]!r}, [{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
            if area < TINY:
                self._note("tiny box", box)
            elif area >= WHOLE:
                self._note("whole-image box", box)
            self.area[round(1000 * area)] += 1

    def result(self, path: str, total: int) -> dict[str, Any]:
        """All numbers of the set at `path`, which claims `total` images, as JSON can hold them."""
        return {
            "set": {"path": path},
            "images": {
                "count": self.images,
                "left_out": total - self.images,
                "bytes": self.image_bytes,
                "turned": self.turned,
                "sizes": self.sizes.top(TOP),
                "copies": self.copies.result(),
            },
            "texts": {kind: texts.result() for kind, texts in self.texts.items()},
            "regions": {
                "count": self.area.total(),
                "per_image": self.regions.result(),
                "area_per_mille": self.area.result(),
            },
        }


def flaws(kind: str, plain: str, tokens: int) -> list[str]:
    """Flaws of a text, `plain` in lower case, with so many tokens: "refusal in" or "markup in", "cut" or "long".

    No model wrote web texts, so these are not checked for its refusals and markup.
    """
    names = []
    if kind != "web" and answers.is_refusal(plain):
        names.append("refusal in")
    elif kind != "web" and _LEFTOVER.match(plain):
        names.append("markup in")
    if kind == "description":
        names += ["long"] if tokens > LONG_DESCRIPTION else []
    elif tokens > ROW_LENGTH:
        names.append("cut")
    return names


def texts_of(item: Annotation) -> list[tuple[str, str]]:
    """(kind, text) of all texts; an empty synthetic caption means that there is none."""
    synthetic = [("synthetic", item.synthetic_caption)] if item.synthetic_caption else []
    return [
        *(("web", text) for text in item.captions),
        *synthetic,
        *(("description", region.description) for region in item.regions),
    ]
