"""Zero-shot classification of a folder with one sub-folder a class (method.md, Zero-shot evaluation).

Three protocols: class names in prompts; names with descriptions; descriptions alone, for classes whose
names mean nothing to the model (`names=False`: a class is the mean of its raw descriptions' embeddings).
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax.evaluate import base, prompts, scores

# How region . description similarities [Q, n_c] become one number for a class.
REGION_ORDERS = (
    "queries",  # the paper: each query takes its best description, then the mean over queries
    "descriptions",  # each description takes its best query, then the mean over descriptions
)
_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())


def evaluate(
    predictor: Any,
    *,
    images: epath.PathLike,
    descriptions: epath.PathLike | None = None,
    alphas: Sequence[float] | None = None,
    names: bool = True,
    region_order: str = "queries",
    templates: epath.PathLike | None = None,
    batch_size: int = base.BATCH_SIZE,
) -> dict[str, Any]:
    """Classifies every picture of the folder by alpha * global score + (1 - alpha) * region score.

    Args:
      predictor: the model (see `base`).
      images: folder of class folders, each named after its class (`_` = space).
      descriptions: `D.json`, {"class name": ["description", ...]}; classes without a folder are ignored.
      alphas: shares of the global score in [0, 1]; default 1 without descriptions, 1 and 0.5 with.
      names: the class names stand in the prompts; False: the descriptions alone make the class.
      region_order: what the region score averages over, one of REGION_ORDERS.
      templates: prompts, one a line; default: the general set of the package.
      batch_size: pictures at a time.

    Returns: counts, `chance` (of top-1; `chance_top5`) and for each alpha, under `alpha_A`: `top1`, `top5`
      (95% intervals: `_low`, `_high`), `mean_per_class` (of top-1) and `per_class`. Ties count as if
      broken at random.

    Raises:
      base.InputError, prompts.PromptError: what was given cannot be used.
    """
    classes, paths, labels = class_folders(images)
    check_region_order(region_order)
    alphas = check_alphas(alphas, descriptions, names)
    described = None if descriptions is None else read_descriptions(descriptions, classes)
    features, embeds = _class_embeddings(predictor, classes, described, names, templates)

    with_regions = min(alphas) < 1
    unreadable: dict[str, str] = {}
    targets, hits = [], {alpha: ([], []) for alpha in alphas}
    for batch in base.encode_pictures(
        predictor,
        paths,
        label="zero-shot",
        unreadable=unreadable,
        regions=with_regions,
        batch_size=batch_size,
    ):
        target = labels[batch.index]
        right = target[:, None] == np.arange(len(classes))
        global_scores = scores.global_scores(batch.image_embed, features)
        region_scores = None
        if with_regions:
            score = scores.region_scores if region_order == "queries" else description_scores
            region_scores = score(batch.regions.embed, embeds)
        for alpha in alphas:
            combined = scores.combine(global_scores, region_scores, alpha)
            for k, part in zip((1, 5), hits[alpha]):
                part.append(base.topk_hits(combined, right, k))
        targets.append(target)

    target = np.concatenate(targets)
    result = {
        "kind": "zeroshot",
        "classes": len(classes),
        "pictures": len(target),
        **base.report_unreadable(unreadable),
        "names": names,
        "descriptions": sum(map(len, described)) if described else 0,
        "region_order": region_order,
        "chance": 1 / len(classes),
        "chance_top5": min(1.0, 5 / len(classes)),
    }
    for alpha in alphas:
        top1, top5 = map(np.concatenate, hits[alpha])
        per_class = {
            name: float(top1[target == i].mean())
            for i, name in enumerate(classes)
            if (target == i).any()
        }
        result[f"alpha_{float(alpha)}"] = {
            **base.rate("top1", top1),
            **base.rate("top5", top5),
            "mean_per_class": float(np.mean(list(per_class.values()))),
            "per_class": per_class,
        }
    return result


def check_alphas(
    alphas: Sequence[float] | None, descriptions: epath.PathLike | None, names: bool
) -> list[float]:
    """The alphas to report (default 1, and 0.5 with descriptions). Raises base.InputError."""
    if not alphas:
        alphas = (1.0,) if descriptions is None else (1.0, 0.5)
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise base.InputError(f"alpha: got {alpha}, expected a number from 0 to 1")
    if descriptions is None and (not names or min(alphas) < 1):
        asked = f"alpha {min(alphas):g}" if names else "a test without class names"
        raise base.InputError(f"descriptions: got nothing, expected a file (D.json) for {asked}")
    return [float(alpha) for alpha in alphas]


def check_region_order(order: str) -> None:
    """Raises base.InputError if `order` is not one of REGION_ORDERS."""
    if order not in REGION_ORDERS:
        raise base.InputError(
            f"region order: got {order!r}, expected one of {', '.join(REGION_ORDERS)}"
        )


def description_scores(
    region_embed: np.ndarray, description_embeds: Sequence[np.ndarray]
) -> np.ndarray:
    """The other order than `scores.region_scores`: best query for each description, mean over descriptions.

    Args:
      region_embed: [B, Q, D].
      description_embeds: for each class its descriptions' embeddings, [n_c, D], n_c >= 1.

    Returns: float32 [B, C]. Source: spec/small_scale.md (6), where it beats the paper's order.
    """
    counts = np.array([len(embeds) for embeds in description_embeds])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    descriptions = scores.unit(np.concatenate(list(description_embeds)))  # [sum of n_c, D]
    best = (scores.unit(region_embed) @ descriptions.T).max(axis=1)  # [B, sum of n_c]
    return np.add.reduceat(best, starts, axis=-1) / counts.astype(np.float32)


def class_folders(images: epath.PathLike) -> tuple[list[str], list[epath.Path], np.ndarray]:
    """The class names (folder names, `_` = space, sorted), the pictures and their classes' positions.

    Hidden files and folders (`.DS_Store`, `._x.jpg`) do not count.

    Raises:
      base.InputError: no such folder, fewer than two class folders, two of one name (`a_b` and `a b`),
        or a class without pictures.
    """
    folder = epath.Path(images)
    if not folder.is_dir():
        raise base.InputError(f"{folder}: no such folder; expected one with a sub-folder a class")
    folders = sorted(
        (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda p: p.name,
    )
    if len(folders) < 2:
        raise base.InputError(
            f"{folder}: got {len(folders)} sub-folders, expected at least 2, one a class"
        )
    of_name: dict[str, list[str]] = {}
    for sub in folders:
        of_name.setdefault(_name(sub.name), []).append(sub.name)
    faults = [
        f"{folder}: got the class folders {_listed([repr(s) for s in same])}, all of them the class"
        f" {name!r} (_ = space), expected one folder a class"
        for name, same in of_name.items()
        if len(same) > 1
    ]
    paths, labels, empty = [], [], []
    for label, sub in enumerate(folders):
        found = sorted(
            p for p in sub.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")
        )
        if not found:
            empty.append(sub.name)
        paths += found
        labels += [label] * len(found)
    if empty:
        faults.append(f"{folder}: no pictures in the class folders {_listed(empty)}")
    if faults:
        raise base.InputError("\n".join(faults))
    return [_name(p.name) for p in folders], paths, np.array(labels)


def read_descriptions(path: epath.PathLike, classes: Sequence[str]) -> list[list[str]]:
    """For each class its descriptions, from {"class name": ["description", ...]} (`_` = space in names).

    Raises:
      base.InputError: no such file, another format, or classes that have no description.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise base.InputError(f"{path}: no such file; expected descriptions of the classes as JSON")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise base.InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise base.InputError(f'{path}: expected {{"class name": ["description", ...]}}')
    for name, texts in value.items():
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise base.InputError(f"{path}: {name!r}: expected a list of texts that are not empty")
    known = {_name(name): texts for name, texts in value.items()}
    missing = [name for name in classes if not known.get(name)]
    if missing:
        raise base.InputError(f"{path}: no description of the classes {_listed(missing)}")
    return [known[name] for name in classes]


def _class_embeddings(predictor, classes, described, names, templates):
    """Class features [C, D], and each class's descriptions' embeddings (None without descriptions)."""
    embeds = None if described is None else base.encode_texts(predictor, described)
    if not names:
        return scores.class_features(embeds), embeds
    filled = prompts.load_templates(templates)
    texts = [
        prompts.class_texts(name, filled, described and described[i])
        for i, name in enumerate(classes)
    ]
    return scores.class_features(base.encode_texts(predictor, texts)), embeds


def _name(name: str) -> str:
    return name.replace("_", " ").strip()


def _listed(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
