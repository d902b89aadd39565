"""RefCOCO, RefCOCO+, RefCOCOg: refs(unc).p (a pickle, or the same as JSON) with instances.json.

Also the JSON that MDETR made of them (finetune_refcoco_train.json): COCO's form, one expression an image.
A region is an object with one of its expressions, and each sentence of the refs is a phrase to be grounded, also
where two people gave the same one: the protocol of lichengunc/MAttNet (eval_dets_utils.py), which counts every
sentence with its own box. `split` is that of the refs (train, val, testA, ...). The sets have no captions; their images
are COCO's, so captions_train2014.json may be given as well.
"""

import collections
import pickle
from collections.abc import Iterator
from typing import Any

import msgspec
from etils import epath

from grain_jax.core import annotations, regular_file
from grain_jax.data.sources import base, coco, json_files, staged


class _Sentence(msgspec.Struct):
    sent: str


class _Ref(msgspec.Struct):
    ann_id: base.Id
    image_id: base.Id
    split: str
    sentences: list[_Sentence]


class _ImageItem(coco.ImageItem):
    caption: str | None = None  # an expression, in MDETR's files


class _Object(msgspec.Struct):
    image_id: base.Id
    id: base.Id | None = None
    bbox: list[float] | None = None
    caption: str | None = None  # in COCO's files of captions


class _File(msgspec.Struct):
    images: list[_ImageItem]
    annotations: list[_Object]


# The C reader gives memory to whatever number of an object a pickle names.
class _Plain(pickle._Unpickler):
    """Unpickles lists, dicts, texts and numbers only: a pickle that names anything else could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


class RefCoco(staged.ListedSource):
    """Images that have expressions."""

    needs = "refs(...).p with instances.json, or MDETR's finetune_refcoco_*.json"

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        refs: list[tuple[str, _Ref]] = []  # where it stands, and what it is
        boxes: dict[base.Id | None, tuple[_ImageItem, list[float]]] = {}  # of instances.json
        captions: dict[str, list[str]] = collections.defaultdict(list)  # of each image's file
        said: list[tuple[_ImageItem, list[float], str]] = []  # each sentence with its box
        for path in map(epath.Path, options.annotations):
            content = _load(path, self.needs)
            if isinstance(content, list):
                refs += ((f"{path}[{number}]", ref) for number, ref in enumerate(content))
                continue
            images = {image.id: image for image in content.images}
            mdetr = any(image.caption is not None for image in content.images)
            for number, item in enumerate(content.annotations):
                image = images.get(item.image_id)
                silent = mdetr and image is not None and image.caption is None
                if image is None or silent or (item.bbox is None and item.caption is None):
                    got = f"got image_id {annotations.show(item.image_id)}, expected one of the file's"
                    where, detail = (
                        f"{path}:annotations[{number}]",
                        f"{got}, and a bbox or a caption",
                    )
                    yield base.Fault(where, "bad annotation", detail)
                elif item.caption is not None:
                    captions[image.file_name].append(item.caption)
                elif image.caption is not None:
                    said.append((image, item.bbox, image.caption))
                else:
                    boxes[item.id] = (image, item.bbox)
        if not said and not (refs and boxes):
            got = ", ".join(options.annotations)
            raise base.SourceError(f"got --annotations {got}, expected {self.needs}")
        if refs:
            base.check_split(
                refs[0][0].rpartition("[")[0], options.split, {ref.split for _, ref in refs}
            )
        for where, ref in refs:
            if options.split not in ("", ref.split):
                continue
            image, box = boxes.get(ref.ann_id, (None, None))
            if image is None or image.id != ref.image_id:
                got = f"got image_id {ref.image_id}, ann_id {ref.ann_id}"
                yield base.Fault(where, "bad annotation", f"{got}, expected both in instances.json")
                continue
            said += ((image, box, sentence.sent) for sentence in ref.sentences)

        sizes: dict[str, tuple[float, float] | None] = {}
        sentences_of: dict[str, list[tuple[Any, str]]] = collections.defaultdict(list)
        for image, box, sentence in said:
            sizes[image.file_name] = base.size(image.width, image.height)
            sentences_of[image.file_name].append((tuple(base.xywh(box)), sentence))
        for name, sentences in sentences_of.items():
            of_box = collections.defaultdict(list)
            for box, sentence in dict.fromkeys(sentences):
                of_box[box].append((box, sentence))
            place = {region: at for at, region in enumerate(base.taking_turns(of_box.values()))}
            yield base.Entry(
                name,
                captions.get(name, ()),
                regions=[(*region, base.WHOLE) for region in place],
                size=sizes[name],
                phrases=[[place[sentence]] for sentence in sentences],
            )


def _load(path: epath.Path, expected: str) -> list[_Ref] | _File:
    if path.suffix == ".json":
        return regular_file.read_json(path, list[_Ref] | _File, expected, json_files.MAX_FILE)
    with regular_file.opened(path, expected) as (file, _):
        try:
            # Python 2 wrote it: its byte strings are texts.
            content = _Plain(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises nearly anything
            reason = f"no pickle of plain values ({error})"
            raise base.SourceError(f"{path}: {reason}, expected {expected}") from None
    return regular_file.checked(content, list[_Ref] | _File, str(path), expected)
