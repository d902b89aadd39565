"""RefCOCO, RefCOCO+, RefCOCOg: refs(unc).p, a pickle, with instances.json.

A region is an object with one of its expressions. Each sentence is a phrase to be grounded, also if two
people gave the same one, as lichengunc/MAttNet (eval_dets_utils.py) counts. `split` is one of the refs.
"""

import collections
import pickle
from collections.abc import Iterator
from typing import Any

import msgspec
from etils import epath

from grain_jax.core import regular_file
from grain_jax.data.sources import base, coco, staged
from grain_jax.data.sources.base import Annotation, Fault, Region


class _Sentence(msgspec.Struct):
    sent: str


class _Ref(msgspec.Struct):
    ann_id: base.Id
    image_id: base.Id
    split: str
    sentences: list[_Sentence]


# The C reader gives memory to whatever number of an object a pickle names.
class _Plain(pickle._Unpickler):
    """Unpickles lists, dicts, texts and numbers only: a pickle that names anything else could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


class RefCoco(staged.ListedSource):
    """Images that have expressions."""

    needs = "refs(...).p with instances.json"

    def entries(self, options: base.Options) -> Iterator[Annotation | Fault]:
        paths = sorted(map(epath.Path, options.annotations), key=lambda path: path.suffix)
        if [path.suffix for path in paths] != [".json", ".p"]:
            got = ", ".join(options.annotations)
            raise base.SourceError(f"got --annotations {got}, expected {self.needs}")
        content = regular_file.read_json(paths[0], coco.File, self.needs, base.MAX_FILE)
        refs = _load(paths[1], self.needs)
        base.check_split(paths[1], options.split, {ref.split for ref in refs})
        images = {image.id: image for image in content.images}
        faults: list[Fault] = []
        items = base.items(content.annotations, coco.Object, f"{paths[0]}:annotations", faults)
        boxes = {item.id: item for _, item in items}
        sentences: dict[base.Id, list[tuple[Any, str]]] = collections.defaultdict(list)
        for number, ref in enumerate(refs):
            if options.split not in ("", ref.split):
                continue
            item, where = boxes.get(ref.ann_id), f"{paths[1]}[{number}]"
            if item is None or item.image_id != ref.image_id or ref.image_id not in images:
                got = f"got image_id {ref.image_id}, ann_id {ref.ann_id}, expected both in instances.json"
                faults.append(Fault(where, "bad annotation", got, where))
                continue
            box = tuple(x) if isinstance(x := base.xywh(item.bbox), list | tuple) else x
            sentences[ref.image_id] += ((box, sentence.sent) for sentence in ref.sentences)
        yield from faults
        for identity, pairs in sentences.items():
            image, by_box = images[identity], collections.defaultdict(list)
            for box, text in dict.fromkeys(pairs):
                by_box[box].append((box, text))
            position = {pair: i for i, pair in enumerate(base.taking_turns(by_box.values()))}
            yield Annotation(
                image.file_name,
                regions=[Region(*pair, base.WHOLE) for pair in position],
                drawn_on=(image.width, image.height),
                phrases=[[position[pair]] for pair in pairs],
            )


def _load(path: epath.Path, expected: str) -> list[_Ref]:
    with regular_file.opened(path, expected) as (file, _):
        try:
            # Python 2 wrote it: its byte strings are texts.
            content = _Plain(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises nearly anything
            reason = f"no pickle of plain values ({error})"
            raise base.SourceError(f"{path}: {reason}, expected {expected}") from None
    return regular_file.checked(content, list[_Ref], str(path), expected)
