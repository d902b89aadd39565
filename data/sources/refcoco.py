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

from grain_jax.core import regular_file
from grain_jax.data.sources import base, coco, json_files, staged

_EXPECTED = "refs(...).p with instances.json, or MDETR's finetune_refcoco_*.json"


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
    caption: str | None = None


class _File(msgspec.Struct):
    images: list[_ImageItem]
    annotations: list[_Object]


_Expression = tuple[_ImageItem, tuple[float, ...], str]  # its image, xyxy box, the words


# The C reader gives memory to whatever number of an object a pickle names.
class _Plain(pickle._Unpickler):
    """Unpickles lists, dicts, texts and numbers only: a pickle that names anything else could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


class RefCoco(staged.ListedSource):
    """Images that have expressions."""

    needs = _EXPECTED

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        refs, instances, mdetr, captions = [], [], [], {}
        for path in map(epath.Path, options.annotations):
            content = _load(path)
            if isinstance(content, list):
                refs.append((path, content))
            elif any(image.caption is not None for image in content.images):
                mdetr.append((path, content))
            elif any(item.caption is not None for item in content.annotations):
                names = {image.id: image.file_name for image in content.images}
                for item in content.annotations:
                    captions.setdefault(names.get(item.image_id), []).append(item.caption)
            else:
                instances.append(content)
        if not mdetr and not (refs and instances):
            got = ", ".join(options.annotations)
            raise base.SourceError(f"got --annotations {got}, expected {_EXPECTED}")

        # file -> (box, expression) of each sentence
        sentences_of: dict[str, list[tuple[Any, str]]] = collections.defaultdict(list)
        sizes: dict[str, tuple[float, float] | None] = {}
        for found in (*_of_refs(refs, instances, options.split), *_of_mdetr(mdetr)):
            if isinstance(found, base.Fault):
                yield found
                continue
            image, box, expression = found
            sizes[image.file_name] = image.size
            sentences_of[image.file_name].append((box, expression))
        for image, sentences in sentences_of.items():
            of_box = collections.defaultdict(list)
            for box, text in dict.fromkeys(sentences):
                of_box[box].append((box, text))
            place = {region: at for at, region in enumerate(base.taking_turns(of_box.values()))}
            yield base.Entry(
                image,
                captions.get(image, ()),
                regions=[(*region, base.WHOLE) for region in place],
                size=sizes[image],
                phrases=[[place[sentence]] for sentence in sentences],
            )


def _load(path: epath.Path) -> list[_Ref] | _File:
    if path.suffix == ".json":
        return json_files.read(path, list[_Ref] | _File, _EXPECTED)
    with regular_file.opened(path, _EXPECTED) as (file, _):
        try:
            # Python 2 wrote it: its byte strings are texts.
            content = _Plain(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises nearly anything
            reason = f"no pickle of plain values ({error})"
            raise base.SourceError(f"{path}: {reason}, expected {_EXPECTED}") from None
    return regular_file.checked(content, list[_Ref] | _File, str(path), _EXPECTED)


def _of_refs(
    refs: list[tuple[epath.Path, list[_Ref]]], instances: list[_File], split: str
) -> Iterator[_Expression | base.Fault]:
    images = {image.id: image for content in instances for image in content.images}
    boxes = {item.id: item.bbox for content in instances for item in content.annotations}
    if refs:
        known = {ref.split for _, content in refs for ref in content}
        base.check_split(refs[0][0], split, known)
    for path, content in refs:
        for number, ref in enumerate(content):
            if split and ref.split != split:
                continue
            image, box = images.get(ref.image_id), boxes.get(ref.ann_id)
            if image is None or box is None:
                got = f"image_id {ref.image_id}, ann_id {ref.ann_id}"
                expected = "expected both in instances.json"
                yield base.Fault(f"{path}[{number}]", "bad annotation", f"got {got}, {expected}")
                continue
            for sentence in ref.sentences:
                yield image, tuple(base.xywh(box)), sentence.sent


def _of_mdetr(files: list[tuple[epath.Path, _File]]) -> Iterator[_Expression | base.Fault]:
    for path, content in files:
        images = {image.id: image for image in content.images}
        for number, item in enumerate(content.annotations):
            image = images.get(item.image_id)
            if image is None or image.caption is None or item.bbox is None:
                got = f"got image_id {item.image_id}, expected one of the file's, with a caption, and a bbox"
                yield base.Fault(f"{path}:annotations[{number}]", "bad annotation", got)
                continue
            yield image, tuple(base.xywh(item.bbox)), image.caption
