"""Karpathy's splits of Flickr30k and COCO: dataset_flickr30k.json, dataset_coco.json, on which retrieval is compared.

All captions of an image are taken (mostly five), as people wrote them. `split` is train, restval, val or test.
Source: the files' keys, images[].filename, filepath (COCO: the folder), split, sentences[].raw.
"""

from collections.abc import Iterator

import msgspec

from grain_jax.data.sources import base, staged


class _Sentence(msgspec.Struct):
    raw: str


class _ImageItem(msgspec.Struct):
    filename: str
    split: str
    sentences: list[_Sentence]
    filepath: str | None = None


class _File(msgspec.Struct):
    images: list[_ImageItem]


class Karpathy(staged.ListedSource):
    """The split's images; those of COCO start in train2014/ and val2014/."""

    needs = "dataset_flickr30k.json or dataset_coco.json of Karpathy's splits"

    def entries(self, options: base.Options) -> Iterator[base.Annotation]:
        if len(options.annotations) != 1:
            raise base.SourceError(f"expected one file as --annotations, {self.needs}")
        path = options.annotations[0]
        images = base.read_json(path, _File, self.needs).images
        base.check_split(path, options.split, {image.split for image in images})
        for image in images:
            if options.split in ("", image.split):
                folder = f"{image.filepath}/" if image.filepath else ""
                captions = [sentence.raw for sentence in image.sentences]
                yield base.Annotation(folder + image.filename, captions)
