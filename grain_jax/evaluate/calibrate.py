"""Calibration: from cosines to the probability that a class is present, and thresholds (docs/evaluate.md)."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, NamedTuple

import msgspec
from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import TEMPLATES, option
from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import numpy as np
    from scipy import optimize, special

    from grain_jax.checkpoint import pretrained
    from grain_jax.evaluate import encode, test_sets
    from grain_jax.inference import calibration, prompts
    from grain_jax.runtime import processes

BINS = 15  # of the probabilities, for the ECE
MAX_SCALE = 1000.0  # if the cosines separate the classes, no finite scale is best
MAX_CLASSES = 1000  # distinct descriptions: the most frequent ones


class Pairs(NamedTuple):
    """Images and classes."""

    names: list[str]  # of N images
    classes: list[str]  # C
    present: np.ndarray  # bool [N, C]
    embeds: dict[
        str, tuple[np.ndarray, ...]
    ]  # "image" [N, D]; "regions", if it has some, [N, Q, D] and prior
    counts: dict[str, Any]  # for the result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(AnnotatedImages):
    """Probabilities and thresholds from the cosines of a validation set; stored beside the model."""

    shown = ("ece", "log_loss")
    lower_is_better = ("ece", "log_loss", "brier")
    kind: str = "calibrate"
    images: str = option("", "Class folders, or where annotations' paths start.", "DIR", required=True)
    annotations: str | None = option(None, "Descriptions as classes; default: class folders.", "A.jsonl")
    templates: str | None = option(None, TEMPLATES, "FILE")
    thresholds: str = option("class", "Thresholds with the best F1.", choices=("class", "common"))
    share: float = option(0.5, "Share of the images that fit; the others measure.", "P")

    def check(self, model: Any = None) -> int:
        if not 0 < self.share < 1:
            raise errors.UserError(f"share: got {self.share}, expected a number between 0 and 1")
        prompts.load_templates(self.templates)
        return super().check(model) if self.annotations else len(test_sets.ClassFolders(self.images))

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Fits and measures each score that the data has: `image`, and with annotations `regions`.

        Returns: counts; `image` and `regions`, each with `before` (the model's own scale and bias) and
          `after`: their `ece`, `log_loss` and `brier`; `notes`; and `calibration`, the content of the file. A
          score that is not higher where a class is present has no `after`, and the file has nothing for it.
        """
        templates = [] if self.annotations else prompts.load_templates(self.templates)
        pairs = self._pairs(predictor)
        encode_all = lambda texts: encode.encode_distinct(predictor, texts)
        text_embeds = calibration.embed_texts(encode_all, pairs.classes, templates)
        model_logits = {"image": (predictor.logit_scale, predictor.logit_bias)}
        model_logits |= {"regions": (predictor.region_logit_scale, predictor.region_logit_bias)}
        # By the hash of its name an image is always on the same side.
        hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") for name in pairs.names]
        fits = np.array(hashes) < self.share * 2**48
        right = pairs.present[fits]
        if fits.all() or not right.any() or right.all():
            got = f"{fits.sum()} images to fit and {(~fits).sum()} to measure"
            advice = "expected some of each, with and without a class; take more images or another --share"
            raise errors.UserError(f"{self.images}: got {got}, {advice}")
        without = [pairs.classes[i] for i in np.flatnonzero(right.sum(axis=0) == 0)]

        def measured() -> dict[str, Any]:
            out, stored = {}, {}
            note = f"{len(without)} classes without images to fit have the common threshold: "
            notes = [note + test_sets.listed(without)] if without else []
            for way, embeds in pairs.embeds.items():
                cosines = calibration.cosines(embeds[0], text_embeds, *embeds[1:]).astype(np.float64)
                fitted = fit(cosines[fits], right)
                ways = {"before": model_logits[way]} | ({"after": fitted} if fitted[0] else {})
                logits = {k: scale * cosines + (bias or 0) for k, (scale, bias) in ways.items()}
                out[way] = {k: reliability(x[~fits], pairs.present[~fits]) for k, x in logits.items()}
                if not fitted[0]:
                    notes.append(f"{way}: the scores are not higher where present; nothing is stored")
                    continue
                p, of_class, blind = special.expit(logits["after"][fits]), {}, []
                common = best_threshold(p, right)
                columns = zip(pairs.classes, cosines[fits].T, p.T, right.T)
                for name, x, p_class, y in columns if self.thresholds == "class" else ():
                    if not y.any():
                        of_class[name] = common
                    elif y.all() or x[y].mean() <= x[~y].mean():
                        blind.append(name)
                    else:
                        of_class[name] = best_threshold(p_class, y)
                if blind:
                    lacking = f"no threshold: {test_sets.listed(blind)}"
                    notes.append(f"{way}: the scores are not higher where these are present; {lacking}")
                numbers = dict(zip(("logit_scale", "logit_bias"), fitted), threshold=common)
                stored[way] = numbers | {"thresholds": of_class, "templates": templates}
            content = {"params": predictor.digests.get("params", ""), "image": None, "regions": None} | stored
            return out | {"calibration": content, "notes": notes}

        return {
            **pairs.counts,
            "classes": len(pairs.classes),
            "fitted": int(fits.sum()),
            "held_out": int((~fits).sum()),
            **processes.of_first(measured),
        }

    def _pairs(self, predictor: Any) -> Pairs:
        if not self.annotations:
            folders = test_sets.ClassFolders(self.images)
            seen = encode.gather_images(predictor, folders, label=self.kind, batch_size=self.batch_size)
            names = ["/".join(folders.paths[i].parts[-2:]) for i in seen.index]
            present = seen.labels[:, None] == np.arange(len(folders.classes))
            counts = {"images": len(names), **encode.report_unreadable(seen.unreadable)}
            return Pairs(names, folders.classes, present, {"image": (seen.image_embed,)}, counts)
        records, seen, counts = self.gather(predictor, regions=predictor.has_regions)
        owner = np.repeat(np.arange(len(records)), [len(x.regions) for x in records])
        every = [region.description for record in records for region in record.regions]
        texts, text = prompts.distinct(every, encode.as_read)
        present = np.zeros((len(records), len(texts)), bool)
        present[owner, text] = True
        kept = np.sort(np.argsort(-present.sum(axis=0), kind="stable")[:MAX_CLASSES])
        embeds: dict[str, tuple[np.ndarray, ...]] = {"image": (seen.image_embed,)}
        embeds |= {"regions": seen.regions[1:]} if predictor.has_regions else {}
        counts["classes_left_out"] = len(texts) - len(kept)
        names = [record.image for record in records]
        return Pairs(names, [texts[i] for i in kept], present[:, kept], embeds, counts)

    def finish(self, predictor: Any, result: dict[str, Any]) -> str:
        """Stores the calibration beside the model."""
        content = msgspec.convert(result["calibration"], calibration.Calibration)
        folder, reason = str(predictor.folder), "the model comes with the package"
        if not (content.image or content.regions):
            return "not stored: no score is higher where classes are present; train longer"
        if "://" in folder:
            reason = "the folder is remote"
        elif not pretrained.is_packaged(folder):
            try:
                calibration.write(folder, content)
                return f"stored: {folder}/{calibration.NAME}"
            except OSError as error:
                reason = error.strerror or str(error)
        return f"not stored beside the model ({folder}: {reason}); `calibration` of --output has it"


def fit(cosines: np.ndarray, present: np.ndarray) -> tuple[float, float]:
    """Scale, at most MAX_SCALE, and bias with the least log loss; arrays of one shape, `present` bool."""
    x, y = cosines.astype(np.float64).ravel(), present.ravel().astype(np.float64)
    middle, width = x.mean(), max(x.std(), 1e-6)
    x = (x - middle) / width

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = parameters[0] * x + parameters[1]
        error = special.expit(logits) - y
        value = (np.logaddexp(0, logits) - y * logits).mean()
        return value, np.array([(error * x).mean(), error.mean()])

    start, bounds = [1.0 * (MAX_SCALE * width > 1), special.logit(y.mean())], (0, MAX_SCALE * width)
    best = optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[bounds, (None, None)],
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    scale = float(best.x[0] / width)
    return scale, float(best.x[1] - scale * middle)


def best_threshold(probabilities: np.ndarray, present: np.ndarray) -> float:
    """The threshold with the best F1, midway between two probabilities; arrays of one shape, some present."""
    order = np.argsort(-probabilities, axis=None, kind="stable")
    p, y = probabilities.ravel()[order].astype(np.float64), present.ravel()[order]
    after = np.append(p[1:], 0.0)
    f1 = 2 * np.cumsum(y) / (np.arange(1, len(y) + 1) + y.sum())
    cut = np.where(p > after, f1, -1.0).argmax()  # equal ones stay together
    return float((p[cut] + after[cut]) / 2)


def reliability(logits: np.ndarray, present: np.ndarray) -> dict[str, float]:
    """`ece` over BINS bins, `log_loss` in nats and `brier`; arrays of one shape, `present` bool."""
    z, y = logits.astype(np.float64).ravel(), present.ravel().astype(np.float64)
    p = special.expit(z)
    which = np.minimum((p * BINS).astype(int), BINS - 1)
    gap = np.bincount(which, weights=p - y, minlength=BINS)
    return {
        "ece": float(np.abs(gap).sum() / len(p)),
        "log_loss": float((np.logaddexp(0, z) - y * z).mean()),
        "brier": float(((p - y) ** 2).mean()),
    }
