"""Images to classify: a folder with a sub-folder per class, or a TFDS dataset; nothing is downloaded."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image
from etils import epath

from grain_jax.core import errors
from grain_jax.core import images as image_files
from grain_jax.evaluate import class_names
from grain_jax.evaluate.base import how_to_get
from grain_jax.inference.inputs import InputError

_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())


class Image(NamedTuple):
    """An image of a test set."""

    name: str
    load: Callable[[], PIL.Image.Image]  # raises core.images.ImageError
    label: int  # position in the classes of the set; -1: it is in none


class ClassFolders:
    """A folder with one sub-folder per class; hidden files and folders (`.DS_Store`) do not count.

    Args:
      folder: holds the class folders, each named after its class (`_` = space), in the classes' order.
      classes: class file with the folder names as labels (see class_names); None: the folders' names.
      get: how to get the data, for errors.MissingData.

    Raises:
      errors.MissingData: no such folder.
      InputError: fewer than two class folders, two of one name (`a_b` and `a b`, or NFC and NFD), or a class
        without images; a UserError if `classes` does not fit the folders.
    """

    def __init__(self, folder: epath.PathLike, classes: str | None = None, get: str | None = None):
        if not str(folder):
            raise errors.MissingData(f"images: got nothing, expected class folders{how_to_get(get)}")
        folder = epath.Path(folder).expanduser()
        if not folder.is_dir():
            expected = f"expected one with a sub-folder per class{how_to_get(get)}"
            raise errors.MissingData(f"{folder}: no such folder; {expected}")
        folders = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
        folders.sort(key=lambda path: class_names.composed(path.name))
        names = [path.name for path in folders]
        self.classes = [of_folder(name) for name in names]
        is_image = lambda path: path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        images = [sorted(filter(is_image, path.iterdir())) for path in folders]
        faults = []
        if len(names) < 2:
            faults.append(f"got {len(names)} sub-folders, expected at least 2, one per class")
        if twice := class_names.twice(self.classes):
            same = [ascii(name) for name in names if of_folder(name) == twice]
            faults.append(f"got the class folders {listed(same)}, all of them the class {twice!r}")
        if empty := [name for name, paths in zip(names, images) if not paths]:
            faults.append(f"no images in the class folders {listed(empty)}")
        if faults:
            raise InputError("\n".join(f"{folder}: {fault}" for fault in faults))
        self.paths = [path for paths in images for path in paths]
        self.labels = np.repeat(np.arange(len(names)), list(map(len, images)))  # int [N], of the images
        self.stems = class_names.stems(names, classes)  # second names, for files of descriptions
        if classes is not None:
            self.classes = class_names.for_labels(names, len(names), classes)

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, positions: range) -> Iterable[Image]:
        """The images at consecutive positions, in order."""
        return (of_path(self.paths[i], int(self.labels[i])) for i in positions)


class TfdsSet:
    """A split of a dataset that TensorFlow Datasets has prepared; the TFDS code of the dataset is not needed.

    Args:
      name: "food101", "sun397/tfds" (with a config) or "food101:2.0.0"; the newest version if none is given.
      split: "test", or a part of one, "test[:1000]".
      data_dir: folder of the prepared sets; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      classes: see class_names.for_labels.
      get: how to get the data, for errors.MissingData; None: a command that lets TFDS prepare it.

    Raises:
      errors.MissingData: there is no such set.
      InputError: it has no such split, or its examples have no `image` and `label`; or a UserError.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None = None,
        classes: str | None = None,
        get: str | None = None,
    ):
        tfds = _tensorflow_datasets(name)
        folder = find_tfds(name, data_dir, get)
        self._name, self._builder = name, tfds.builder_from_directory(folder)
        info: Any = self._builder.info
        try:
            (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
        except ValueError:  # an unknown split, or more than one part
            known = f"one of {', '.join(info.splits)}, or a part of it such as test[:1000]"
            raise InputError(f"{folder}: split: got {split!r}, expected {known}") from None
        self._split = part.splitname
        self._range = range(info.splits[part.splitname].num_examples)[part.from_ : part.to]
        labels: Any = dict(info.features).get("label")
        if not isinstance(labels, tfds.features.ClassLabel) or "image" not in info.features:
            raise InputError(f"{folder}: has {info.features}, expected image and label (a class)")
        self.classes = class_names.for_labels(labels.names, labels.num_classes, classes)
        self.stems = class_names.stems(labels.names, classes)

    def __len__(self) -> int:
        return len(self._range)

    def images(self, positions: range) -> Iterable[Image]:
        """As of ClassFolders. Raises InputError if they cannot be read."""
        rows = self._range[positions.start : positions.stop]
        try:
            for position, example in zip(positions, self._examples(rows), strict=True):
                name = f"{self._name} {self._split} {self._range[position]}"
                load = functools.partial(image_files.decode_image, example["image"], name, "file")
                if example["label"] < 0:
                    raise ValueError(f"{name} has no label, expected another split")
                yield Image(name, load, int(example["label"]))
        # A damaged or missing file; the errors of TensorFlow have no common class.
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self._name} {self._split}: cannot be read: {reason}") from None

    def _examples(self, rows: range) -> Iterable[dict]:
        if not rows:
            return ()
        tfds = _tensorflow_datasets(self._name)
        encoded = {"image": tfds.decode.SkipDecoding()}
        if self._builder.info.file_format.value == "array_record":
            source = self._builder.as_data_source(self._split, decoders=encoded)
            return (source[row] for row in rows)
        return self._builder.as_dataset(
            split=tfds.core.ReadInstruction(self._split, from_=rows.start, to=rows.stop, unit="abs"),
            decoders=tfds.decode.PartialDecoding({"image": True, "label": True}, encoded),
            shuffle_files=False,
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        ).as_numpy_iterator()


TestSet: TypeAlias = ClassFolders | TfdsSet


def of_path(path: epath.PathLike, label: int = -1, orientation: str = "exif") -> Image:
    """The image in the file `path`, with `orientation` as of `core.images`."""
    return Image(str(path), functools.partial(image_files.load_image, path, orientation), label)


def find_tfds(name: str, data_dir: str | None, get: str | None = None) -> epath.Path:
    """The folder of a prepared TFDS set: of the version that `name` gives, or the newest; or MissingData."""
    base = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    path, _, version = name.partition(":")
    infos = (base / path).glob(f"{version or '*.*.*'}/dataset_info.json")
    versions = [x.parent for x in infos if re.fullmatch(r"\d+\.\d+\.\d+", x.parent.name)]
    if not versions:
        looked = f"{base / path}/{version or 'VERSION'}/dataset_info.json"
        prepare = f"tfds.builder({name!r}, data_dir={str(base)!r}).download_and_prepare()"
        get = get or f'python -c "import tensorflow_datasets as tfds; {prepare}"'
        raise errors.MissingData(f"no TFDS set {name} (looked for {looked}){how_to_get(get)}")
    return max(versions, key=lambda sub: tuple(map(int, sub.name.split("."))))


def _tensorflow_datasets(name: str) -> Any:
    """Imports the package, which is slow to import and not on every machine."""
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        get = how_to_get("pip install 'grain_jax[data]'")
        raise errors.MissingData(f"TFDS set {name}: needs {error.name}{get}") from None
    return tfds


def of_folder(name: str) -> str:
    """The class name that a folder name stands for."""
    return class_names.composed(name).replace("_", " ").strip()


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first `limit` names, separated by commas, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
