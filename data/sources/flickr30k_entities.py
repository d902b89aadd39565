"""Flickr30k Entities: Sentences/ID.txt and Annotations/ID.xml; images are ID.jpg.

A region is a box with a phrase of its coreference chain. A phrase to be grounded is one place in one sentence, with
all boxes of its chain: what ashkamath/mdetr (flickr_eval.py) counts. Source of the files' form: the README and
flickr30k_entities_utils.py of BryanPlummer/flickr30k_entities; `split` reads its train.txt, val.txt or test.txt (a
list of ids).
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data.sources import base, staged

_PHRASE = re.compile(r"\[/EN#(\d+)/[^\s\[\]]+\s+([^\[\]]*)\]")  # [/EN#CHAIN/TYPE/TYPE word word]
_NOT_VISUAL = "0"
_MAX_BYTES = 64 << 10  # of the sentences or the boxes of an image, which have a few thousand
_MAX_REGIONS = 10_000  # of an image
_MAX_LIST = 16 << 20  # bytes of a list of ids


class Flickr30kEntities(staged.ListedSource):
    """Images that have a file in Sentences."""

    needs = "the folder with Sentences and Annotations"

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
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
                said = regular_file.read(sentences / f"{name}.txt", _MAX_BYTES, "sentences")
                xml = regular_file.read(annotations / f"{name}.xml", _MAX_BYTES, "boxes")
                yield _entry(f"{name}.jpg", said.decode(), ET.fromstring(xml))
            except (ET.ParseError, LookupError, ValueError, TypeError, AttributeError) as error:
                got = f"{type(error).__name__}: {error}"
                yield base.Fault(f"{name}.jpg", "bad annotation", got)


def _entry(image: str, sentences: str, xml: ET.Element) -> base.Entry:
    said = [found for found in _PHRASE.findall(sentences) if found[0] != _NOT_VISUAL]
    phrases: dict[str, dict[str, None]] = {}  # chain -> its phrases, in order, each once
    for chain, phrase in said:
        phrases.setdefault(chain, {})[phrase] = None
    boxes: list[list[tuple[Any, str]]] = []  # of each object: its (box, phrase)
    chains: list[set[str]] = []  # of each object
    left_out = []
    for item in xml.iter("object"):
        corners = item.find("bndbox")
        if corners is None:  # of the whole scene, or not to be seen
            continue
        x1, y1, x2, y2 = (int(corners.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
        # Pixels are counted from 1, the last one included: edges are at x1 - 1 and x2.
        box = (x1 - 1, y1 - 1, x2, y2)
        names = [name.text for name in item.iter("name")]
        texts = dict.fromkeys(text for name in names for text in phrases.get(name, ()))
        boxes.append([(box, text) for text in texts])
        if sum(map(len, boxes)) > _MAX_REGIONS:
            raise ValueError(f"expected at most {_MAX_REGIONS:,} boxes with their phrases")
        chains.append(set(names))
        if not texts:
            listed = ", ".join(names)
            left_out.append(("no description", f"no sentence names chain {listed} at box {box}"))
    numbered = [[(k, region) for region in found] for k, found in enumerate(boxes)]
    regions = list(base.taking_turns(numbered))
    right: dict[tuple[str, str], list[int]] = {}  # phrase of a chain -> its regions
    for at, (k, (_, text)) in enumerate(regions):
        for chain in chains[k]:
            right.setdefault((chain, text), []).append(at)
    size = xml.find("size")
    return base.Entry(
        image,
        captions=[_PHRASE.sub(r"\2", line) for line in sentences.splitlines()],
        regions=[(*region, base.WHOLE) for _, region in regions],
        size=(int(size.findtext("width")), int(size.findtext("height"))),
        left_out=left_out,
        phrases=[right[one] for one in said if one in right],  # others: a chain without a box
    )
