"""Flickr30k Entities: Sentences/ID.txt and Annotations/ID.xml; images are ID.jpg.

A region is a box with a phrase of its coreference chain. A phrase to be grounded is one place in one
sentence, with all boxes of its chain: what ashkamath/mdetr (flickr_eval.py) counts. Source: README and
flickr30k_entities_utils.py of BryanPlummer/flickr30k_entities; `split` reads its lists, such as train.txt.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data.sources import base, staged
from grain_jax.data.sources.base import Annotation, Fault, Region

_PHRASE = re.compile(r"\[/EN#(\d+)/[^\s\[\]]+\s+([^\[\]]*)\]")  # [/EN#CHAIN/TYPE/TYPE word word]
_NOT_VISUAL = "0"
_MAX_BYTES = 64 << 10  # of the sentences or the boxes of an image, which have a few thousand
_MAX_REGIONS = 10_000  # per image
_MAX_LIST = 16 << 20  # bytes of a list of ids


class Flickr30kEntities(staged.ListedSource):
    """Images that have a file in Sentences."""

    needs = "the folder with Sentences and Annotations"

    def entries(self, options: base.Options) -> Iterator[Annotation | Fault]:
        root = epath.Path(options.annotations[0])
        sentences, annotations = root / "Sentences", root / "Annotations"
        if len(options.annotations) != 1 or not (sentences.is_dir() and annotations.is_dir()):
            raise base.SourceError(f"{root}: expected --annotations, {self.needs}")
        names = sorted(path.stem for path in sentences.glob("*.txt"))
        if options.split:
            listed = regular_file.read(root / f"{options.split}.txt", _MAX_LIST, "a list of ids")
            chosen = set(listed.decode("utf-8", "replace").split())
            names = [name for name in names if name in chosen]
        for name in names:
            try:
                text = regular_file.read(sentences / f"{name}.txt", _MAX_BYTES, "sentences")
                xml = regular_file.read(annotations / f"{name}.xml", _MAX_BYTES, "boxes")
                yield _entry(f"{name}.jpg", text.decode(), ET.fromstring(xml))
            except (ET.ParseError, LookupError, ValueError, TypeError, AttributeError) as error:
                got = f"{type(error).__name__}: {error}"
                yield Fault(f"{name}.jpg", "bad annotation", got)


def _entry(image: str, sentences: str, xml: ET.Element) -> Annotation:
    named = [pair for pair in _PHRASE.findall(sentences) if pair[0] != _NOT_VISUAL]
    phrases: dict[str, dict[str, None]] = {}  # chain -> its phrases, in order, each once
    for chain, phrase in named:
        phrases.setdefault(chain, {})[phrase] = None
    objects: list[list[tuple[Any, str, set[str]]]] = []  # (box, phrase, chains) of each
    left_out = []
    for item in xml.iter("object"):
        corners = item.find("bndbox")
        if corners is None:  # it is the whole scene, or cannot be seen
            continue
        x1, y1, x2, y2 = (int(corners.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
        # Pixels are counted from 1, the last one included: edges are at x1 - 1 and x2.
        box = (x1 - 1, y1 - 1, x2, y2)
        chains = [name.text for name in item.iter("name")]
        texts = dict.fromkeys(text for chain in chains for text in phrases.get(chain, ()))
        objects.append([(box, text, set(chains)) for text in texts])
        if sum(map(len, objects)) > _MAX_REGIONS:
            raise ValueError(f"expected at most {_MAX_REGIONS:,} boxes with their phrases")
        if not texts:
            detail = f"no sentence names chain {', '.join(chains)} at box {box}"
            left_out.append(Fault(image, "no description", detail))
    regions = list(base.taking_turns(objects))
    right: dict[tuple[str, str], list[int]] = {}  # phrase of a chain -> its regions
    for position, (_, text, chains) in enumerate(regions):
        for chain in chains:
            right.setdefault((chain, text), []).append(position)
    size = xml.find("size")
    return Annotation(
        image,
        captions=[_PHRASE.sub(r"\2", line) for line in sentences.splitlines()],
        regions=[Region(box, text, base.WHOLE) for box, text, _ in regions],
        drawn_on=(int(size.findtext("width")), int(size.findtext("height"))),
        left_out=left_out,
        phrases=[right[pair] for pair in named if pair in right],  # others: no box
    )
