"""The benchmark suite of the paper: zero-shot classification, retrieval, grounding, boxes, segmentation.

COMMAND   grain-jax evaluate suite --checkpoint DIR --config eval --output OUT.json
          --config.data_dir=DIR (TFDS), --config.folders=DIR (the rest), --config.descriptions=DIR (NAME.json)
          --config.evals.food101.split='test[:1000]' and the like for one set
          eval:probes adds linear probes of the TFDS sets, NAME_probe
DATA      nothing is downloaded: a missing set is skipped, and a line says how to get it
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from grain_jax.evaluate.kinds import evaluator

# Entry -> TFDS name, split, class names that come with the package (None: the labels of the set).
TFDS = {
    "cifar10": ("cifar10", "test", "cifar10"),
    "cifar100": ("cifar100", "test", "cifar100"),
    "sun397": ("sun397/tfds", "test", "sun397"),
    "cars196": ("cars196", "test", "cars196"),
    "dtd": ("dtd", "test", None),
    "oxford_iiit_pet": ("oxford_iiit_pet", "test", None),
    "caltech101": ("caltech101", "test", "caltech101"),
    "oxford_flowers102": ("oxford_flowers102", "test", "oxford_flowers102"),
    "caltech_birds2011": ("caltech_birds2011", "test", "caltech_birds2011"),
    "places365_small": ("places365_small", "validation", "places365_small"),
    "food101": ("food101", "validation", None),
    "imagenet2012": ("imagenet2012", "validation", "imagenet2012"),
}
_FG_OVD = dict(hard="1_attributes", medium="2_attributes", easy="3_attributes")
_FG_OVD |= {"trivial": "shuffle_negatives", "color": "color", "material": "material"}
_FG_OVD |= {"pattern": "pattern", "transparency": "transparency"}
_REFCOCO = "'refs(unc).p' instances.json"
# Entry -> kind, folder of the images below `folders`, and the flags of the grain-jax annotate command that
# makes A.jsonl: --source, --annotations and --split.
ANNOTATED = {
    "flickr30k": ("retrieval", "flickr30k", "karpathy", "dataset_flickr30k.json", "test"),
    "mscoco": ("retrieval", "coco", "karpathy", "dataset_coco.json", "test"),
    "flickr30k_entities": ("grounding", "flickr30k", "flickr30k_entities", "ENTITIES", "test"),
    **{
        f"refcoco_{split}": ("grounding", "coco/train2014", "refcoco", _REFCOCO, split)
        for split in ("val", "testA", "testB")
    },
    "coco": ("boxes", "coco/val2017", "coco", "instances_val2017.json", ""),
    "lvis": ("boxes", "coco", "lvis", "lvis_v1_val.json", ""),
    **{
        f"fg_ovd_{name}": ("hard_negatives", "coco", "fg_ovd", f"{file}.json", "")
        for name, file in _FG_OVD.items()
    },
}
# Negatives per box in FG-OVD's files, if they are fewer than 10.
_FEWER_NEGATIVES = {"fg_ovd_pattern": 7, "fg_ovd_transparency": 2}
# Entry -> format of the set in the folder of that name below `folders`, and how to get it.
SEGMENTED = {
    "ade20k": ("ade20k", "ADEChallengeData2016.zip of data.csail.mit.edu/places/ADEchallenge"),
    "voc2012": ("voc", "VOCdevkit/VOC2012 of VOCtrainval_11-May-2012.tar, host.robots.ox.ac.uk"),
}
SETS = (*TFDS, "products2023", *ANNOTATED, *SEGMENTED)
PROBES = tuple(f"{name}_probe" for name in TFDS)  # linear probes, trained on `train`


def entries(
    sets: Iterable[str] = SETS,
    data_dir: Any = "~/tensorflow_datasets",
    folders: Any = "~/grain_benchmarks",
    descriptions: Any = None,
    alphas: Any = (1.0, 0.75, 0.5, 0.25, 0.0),
    templates: Any = None,
    missing: str = "skip",
) -> dict[str, dict]:
    """Entries of `evals`; a training config takes some of them: `c.evals = entries(sets=("cifar10",))`.

    All but `sets` and `missing` may be references of a ConfigDict.

    Args:
      sets: names, of SETS and PROBES.
      data_dir: folder of TFDS.
      folders: has NAME/A.jsonl of the annotated sets, their images below pictures/, products2023/, and NAME/
        of the sets with masks, each in its own layout.
      descriptions: folder of NAME.json; without its file, a dataset is evaluated by names alone.
      alphas: shares of the global score, if there are descriptions.
      templates: file of prompts; None for the general ones.
      missing: "skip" or "error".
    """
    out = {}
    for name in sets:
        if name in PROBES:
            data = _tfds(name.removesuffix("_probe"), data_dir)
            out[name] = evaluator("linear_probe", **data, missing=missing)
            continue
        if name in ANNOTATED:
            out[name] = _annotated(name, folders, templates, missing=missing)
            continue
        if name in SEGMENTED:
            layout, get = SEGMENTED[name]
            fields = dict(templates=templates, missing=missing, get=get, format=layout)
            out[name] = evaluator("segmentation", folders + f"/{name}", **fields)
            continue
        fields: dict[str, Any] = dict(alphas=alphas, templates=templates, missing=missing)
        fields["class_score"] = "mean"  # as the paper
        if descriptions is not None:
            fields["descriptions"] = descriptions + f"/{name}.json"
        if name == "products2023":
            how = "a folder per product with its images, which the authors of the paper have"
            out[name] = evaluator("zeroshot", folders + "/products2023", get=how, **fields)
        else:
            out[name] = evaluator("zeroshot", **_tfds(name, data_dir), **fields)
    return out


def _tfds(name: str, data_dir: Any) -> dict[str, Any]:
    fields: dict[str, Any] = dict(zip(("tfds", "split", "classes"), TFDS[name]), data_dir=data_dir)
    if name == "imagenet2012":  # TFDS cannot fetch it
        archives = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of image-net.org into "
        fields["get"] = archives + data_dir + "/downloads/manual, then TFDS's download_and_prepare()"
    return fields


def _annotated(name: str, folders: Any, templates: Any, **fields: Any) -> dict[str, Any]:
    kind, pictures, source, files, split = ANNOTATED[name]
    if kind == "boxes":
        fields["templates"] = templates
    images, output = folders + f"/pictures/{pictures}", folders + f"/{name}"
    get = f"grain-jax annotate --source {source} --annotations {files} --passes none --images "
    get = get + images + " --output " + output + (f" --split {split}" if split else "")
    if name in _FEWER_NEGATIVES:
        fields["negatives"] = _FEWER_NEGATIVES[name]
    if name == "lvis":  # all 1203 classes, with their groups
        fields["classes"] = "lvis"
    return evaluator(kind, images, annotations=output + "/A.jsonl", get=get, **fields)


def get_config(also=""):
    if also not in ("", "probes"):
        raise ValueError(f"got :{also}, expected :probes or nothing")
    c = ConfigDict()
    c.data_dir = "~/tensorflow_datasets"
    c.folders = "~/grain_benchmarks"
    c.descriptions = placeholder(str)
    c.templates = placeholder(str)
    c.alphas = (1.0, 0.75, 0.5, 0.25, 0.0)
    # References: a value that the command line sets here is set in the entries too.
    shared = ("data_dir", "folders", "descriptions", "templates", "alphas")
    sets = SETS + PROBES if also else SETS
    c.evals = entries(sets, **{key: c.get_ref(key) for key in shared})
    return c
