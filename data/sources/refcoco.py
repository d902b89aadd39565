"""RefCOCO, RefCOCO+, RefCOCOg: refs(unc).p (a pickle, or the same as JSON) with instances.json.

A region is an object with one of its expressions. Each sentence is a phrase to be grounded, also if two people gave the
same one: lichengunc/MAttNet (eval_dets_utils.py) counts every sentence with its own box. `split` is a split of the refs
(train, val, testA, ...). The sets have no captions. Their images are COCO's, so captions_train2014.json may be given too.
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
        refs: list[tuple[str, _Ref]] = []  # where it stands, and what it is
        boxes: dict[base.Id | None, tuple[coco.ImageItem, Any]] = {}  # of instances.json
        captions: dict[str, list[str]] = collections.defaultdict(list)  # by the image's file
        sentences: dict[str, list[tuple[Any, str]]] = collections.defaultdict(list)  # with boxes
        sizes: dict[str, Any] = {}
        for path in map(epath.Path, options.annotations):
            content = _load(path, self.needs)
            if isinstance(content, list):
                refs += ((f"{path}[{number}]", ref) for number, ref in enumerate(content))
                continue
            images = {image.id: image for image in content.images}
            for where, item in base.items(content.annotations, coco.Object, f"{path}:annotations"):
                image = None if isinstance(item, Fault) else images.get(item.image_id)
                if isinstance(item, Fault):
                    yield item
                elif image is None or (item.bbox is None and item.caption is None):
                    detail = "expected the image_id of an image, and a bbox or a caption"
                    yield Fault(where, "bad annotation", detail, where)
                elif item.caption is not None:
                    captions[image.file_name].append(item.caption)
                else:
                    boxes[item.id] = (image, item.bbox)
        if not (refs and boxes):
            got = ", ".join(options.annotations)
            raise base.SourceError(f"got --annotations {got}, expected {self.needs}")
        base.check_split(refs[0][0], options.split, {ref.split for _, ref in refs})
        for where, ref in refs:
            if options.split not in ("", ref.split):
                continue
            image, box = boxes.get(ref.ann_id, (None, None))
            if image is None or image.id != ref.image_id:
                got = f"got image_id {ref.image_id}, ann_id {ref.ann_id}"
                detail = f"{got}, expected both in instances.json"
                yield Fault(where, "bad annotation", detail, where)
                continue
            sizes[image.file_name] = base.size(image.width, image.height)
            pairs = ((tuple(base.xywh(box)), sentence.sent) for sentence in ref.sentences)
            sentences[image.file_name] += pairs
        for name, pairs in sentences.items():
            by_box = collections.defaultdict(list)
            for box, text in dict.fromkeys(pairs):
                by_box[box].append((box, text))
            position = {
                pair: index for index, pair in enumerate(base.taking_turns(by_box.values()))
            }
            yield Annotation(
                name,
                captions.get(name, ()),
                regions=[Region(*pair, base.WHOLE) for pair in position],
                drawn_on=sizes[name],
                phrases=[[position[pair]] for pair in pairs],
            )


def _load(path: epath.Path, expected: str) -> list[_Ref] | coco.File:
    if path.suffix == ".json":
        return base.read_json(path, list[_Ref] | coco.File, expected)
    with regular_file.opened(path, expected) as (file, _):
        try:
            # Python 2 wrote it: its byte strings are texts.
            content = _Plain(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises nearly anything
            reason = f"no pickle of plain values ({error})"
            raise base.SourceError(f"{path}: {reason}, expected {expected}") from None
    return regular_file.checked(content, list[_Ref], str(path), expected)
