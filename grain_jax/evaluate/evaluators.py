"""The evaluators of the package: their options, the data that they need, and calls of the functions that measure.

On import this module loads only `config` and `errors`, so that a config is parsed without JAX, numpy or TensorFlow;
the methods import the modules that measure. docs/evaluate.md describes the protocols and the results. Below, N_low
and N_high stand for the 95% interval of a number N.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from grain_jax import config, errors
from grain_jax.config.evals import (
    MOST_DRAWS,
    ORIENTATIONS,
    STANDALONE,
    Context,
    exists,
    expanduser,
    same_place,
)

if TYPE_CHECKING:
    from grain_jax.evaluate.annotated import Annotated
    from grain_jax.evaluate.test_sets import TestSet

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages(config.Evaluator):
    """Base of the evaluators on images with classes.

    Options: `images`, a folder with one sub-folder per class, or `tfds`, a set of TensorFlow Datasets, with `split`
    and `data_dir`; `classes`, the class names; `orientation`.
    """

    images: str = ""  # folder that holds the class folders
    # Of the images of folders: "exif", as a viewer shows them, or "file", as their pixels are stored.
    orientation: str = dataclasses.field(
        default=ORIENTATIONS[0], metadata={"choices": ORIENTATIONS}
    )
    tfds: str | None = None  # or a TFDS set: "name" or "name/config:version"
    split: str = "test"  # of the TFDS set
    data_dir: str | None = None  # of TFDS; None: the default of TFDS
    # File of class names, or the name of one in grain_jax/evaluate/classes; None: those of the data set.
    classes: str | None = None

    def faults(self) -> list[str]:
        if self.tfds is None or not self.images:
            return []
        return [f"tfds: got {self.tfds!r} with images={self.images!r}, expected one of the two"]

    @property
    def data(self) -> tuple[str | None, ...]:
        return (self.images,)

    @property
    def files(self) -> tuple[str | None, ...]:
        return (self.classes,)

    def find_data(self) -> None:
        if self.tfds is None:
            super().find_data()
        else:
            from grain_jax.evaluate import test_sets

            test_sets.find_tfds(self.tfds, self.data_dir, self.get)

    def open(self) -> "TestSet":
        """The test set; raises the errors of test_sets.ClassFolders or test_sets.TfdsSet."""
        return self._open(self.images, self.split)

    def _open(self, folder: str, split: str) -> "TestSet":
        from grain_jax.evaluate import test_sets

        if self.tfds is None:
            return test_sets.ClassFolders(folder, self.classes, self.get, self.orientation)
        return test_sets.TfdsSet(self.tfds, split, self.data_dir, self.classes, self.get)

    def check(self) -> int:
        return len(self.open())


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedImages(config.Evaluator):
    """Base of the evaluators on images with annotations.

    Options: `images`, a folder, and `annotations`, the file `A.jsonl` (format: docs/annotate.md); `orientation`.
    """

    images: str = ""  # folder that the paths of the annotations start from
    annotations: str | None = None  # A.jsonl
    # Of the images: "exif", as a viewer shows them, or "file", as their pixels are stored. Boxes are of these pixels.
    orientation: str = dataclasses.field(
        default=ORIENTATIONS[0], metadata={"choices": ORIENTATIONS}
    )

    @property
    def data(self) -> tuple[str | None, ...]:
        return self.annotations, self.images

    @property
    def files(self) -> tuple[str | None, ...]:
        return (self.annotations,)

    @property
    def paths(self) -> tuple[str, str]:
        """`images` and `annotations` with `~` expanded. Raises errors.UserError if `annotations` is None."""
        if self.annotations is None:
            raise errors.UserError(
                f"annotations: got nothing, expected a file (A.jsonl) for {self.kind}"
            )
        return expanduser(self.images), expanduser(self.annotations)

    @property
    def given(self) -> dict[str, str]:
        """The arguments of `evaluate` that every function of these evaluators takes."""
        images, annotations = self.paths
        return dict(images=images, annotations=annotations, orientation=self.orientation)

    def read(self) -> "Annotated":
        """The annotations that have a region; raises the errors of annotated.read."""
        from grain_jax.evaluate import annotated

        return annotated.read_regions(**self.given)

    def check(self) -> int:
        return self._check(_Attempts())

    def _check(self, attempt: "_Attempts") -> int:
        """`check`, which also reports the faults that `attempt` holds already."""
        from grain_jax.evaluate import annotated

        folder, path = self.paths
        attempt(annotated.image_folder, folder)
        found = attempt(self.read)
        if found:
            annotated.report_left_out(path, found.read)
            attempt(annotated.check_some_image, path, found)
        attempt.done()
        return len(found.records) if found else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(LabelledImages):
    """Zero-shot classification by class names and by descriptions of the classes (`zeroshot.evaluate`).

    Measures how often the right class has the best score, or one of the five best.

    Options: those of LabelledImages, `descriptions`, `alphas`, `names`, `region_order`, `unit_features`,
    `templates`.

    Result: for each alpha, under `alpha_A`: `top1`, `top5`, `mean_per_class`, `per_class`; the same under `by_name`
    for names alone, if there are descriptions too; `chance`, `chance_top5`.
    """

    kind: str = "zeroshot"
    descriptions: str | None = None  # D.json; None: class names alone
    # Shares of the global score in the score of a class. Without descriptions only 1 is used.
    alphas: tuple[float, ...] = (1.0, 0.5)
    names: bool = True  # prompts have the class names; False: descriptions alone
    # The region score is a mean over "queries" (the paper) or over "descriptions".
    region_order: str = dataclasses.field(
        default="queries", metadata={"choices": ("queries", "descriptions")}
    )
    # Class features have unit length, as in CLIP (`scores.class_features`).
    unit_features: bool = False
    templates: str | None = None  # file of prompts; None: inference/templates.txt

    @property
    def needs_regions(self) -> bool:
        return bool(self.descriptions) and any(alpha < 1 for alpha in self.alphas)

    @property
    def files(self) -> tuple[str | None, ...]:
        return self.descriptions, self.templates, self.classes

    @property
    def shares(self) -> Sequence[float]:
        """The alphas to evaluate; without descriptions 1 alone, or the alphas outside [0, 1], which `check` rejects."""
        if self.descriptions is not None:
            return self.alphas
        return [alpha for alpha in self.alphas if not 0 <= alpha <= 1] or (1.0,)

    def available(self) -> tuple[Self, str]:
        found, _ = super().available()
        if self.missing != "skip" or self.descriptions is None:
            return found, ""
        path = expanduser(self.descriptions)
        if exists(path):
            return found, ""
        line = f"{path}: not there, expected descriptions of the classes"
        if not self.names:
            raise errors.MissingData(line)
        return dataclasses.replace(self, descriptions=None), f"{line}; evaluated by names alone"

    def check(self) -> int:
        from grain_jax.evaluate import zeroshot
        from grain_jax.inference import prompts

        attempt, described = _Attempts(), _at_home(self.descriptions)
        test_set = attempt(self.open)
        if described is not None:
            known = (test_set.classes, test_set.stems) if test_set else ((), None)
            attempt(zeroshot.read_descriptions, described, *known, self.names)
        attempt(zeroshot.check_alphas, self.shares, described, self.names)
        attempt(zeroshot.check_region_order, self.region_order)
        if self.names:
            attempt(prompts.load_templates, _at_home(self.templates))
        attempt.done()
        return len(test_set) if test_set else 0

    def evaluate(
        self, predictor: Any, context: Context = STANDALONE, *, predictions: Any = None
    ) -> dict[str, Any]:
        from grain_jax.evaluate import zeroshot

        return zeroshot.evaluate(
            predictor,
            self.open(),
            predictions=predictions,
            descriptions=_at_home(self.descriptions),
            alphas=self.shares,
            names=self.names,
            region_order=self.region_order,
            unit_features=self.unit_features,
            templates=_at_home(self.templates),
            batch_size=context.batch_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(LabelledImages):
    """Linear probe and few-shot probes: a logistic regression on image embeddings (`linear_probe.evaluate`).

    Measures how often the right class has the best score, or one of the five best.

    Options: those of LabelledImages, `train`, `shots`, `seeds`.

    Result: for each probe, under `shots_all` or `shots_N`: `top1`, `top5`, `mean_per_class`, `per_class`, `C`,
    `unconverged`; `chance`, `chance_top5`.
    """

    kind: str = "linear_probe"
    # Folder of the training images, or their split of the TFDS set. None: a random part of `images` (fixed seed),
    # or the split "train".
    train: str | None = None
    shots: tuple[
        int, ...
    ] = ()  # training images per class, one probe for each number; 0 and (): all
    seeds: int = dataclasses.field(
        default=5, metadata={"low": 1, "high": MOST_DRAWS}
    )  # random draws of each few-shot probe

    def faults(self) -> list[str]:
        found = super().faults()
        if any(shots < 0 for shots in self.shots):
            found.append(f"shots: got {self.shots}, expected at least 1 each, or 0 for all")
        return found

    @property
    def data(self) -> tuple[str | None, ...]:
        return self.images, self.train

    def open_train(self) -> "TestSet | None":
        """The training images; None if `images` is to be split.

        Raises:
          errors.UserError: they are the test images, or an error of `open`.
        """
        if self.tfds is not None:
            split = self.train or "train"
            if split == self.split:
                raise errors.UserError(
                    f"train: got the split {split!r}, which is the test's, expected another"
                )
            return self._open("", split)
        if self.train is None:
            return None
        if same_place(self.train, self.images):
            raise errors.UserError(
                f"train: got {self.train}, which are the test's images, expected others, or none to split them"
            )
        return self._open(self.train, self.split)

    def check(self) -> int:
        from grain_jax.evaluate import linear_probe

        linear_probe.check_scikit_learn()
        test, train = self.open(), self.open_train()
        linear_probe.check(test, train, self.shots)
        return len(test) + (len(train) if train else 0)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import linear_probe

        return linear_probe.evaluate(
            predictor,
            test=self.open(),
            train=self.open_train(),
            shots=self.shots,
            seeds=self.seeds,
            batch_size=context.batch_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(AnnotatedImages):
    """Retrieval between images and captions, in both directions (`retrieval.evaluate`).

    Measures how often a right answer is among the first 1, 5 or 10.

    Options: those of AnnotatedImages.

    Result: under `image_to_text` and `text_to_image`: `r1`, `r5`, `r10`, `chance_r1`, `chance_r5`, `chance_r10`.
    """

    kind: str = "retrieval"

    def read(self) -> "Annotated":
        from grain_jax.evaluate import annotated

        return annotated.read_captions(**self.given)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import retrieval

        return retrieval.evaluate(predictor, **self.given, batch_size=context.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedRegions(AnnotatedImages):
    """Base of the evaluators on images whose annotations have boxes with descriptions."""

    @property
    def needs_regions(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grounding(AnnotatedRegions):
    """Compares predicted regions with described boxes (`grounding.evaluate`).

    Measures where the predicted boxes are, and whether region embeddings find their descriptions and phrases their
    boxes.

    Options: those of AnnotatedImages.

    Result: `box_iou`, `box_acc50`, `region_to_description_r1`, `phrase_iou`, `phrase_acc50`, and each one with the
    prefix `chance_`; if a phrase has several boxes, `phrase_acc50_any_box`, `phrase_iou_merged_box` and
    `phrase_acc50_merged_box` too.
    """

    kind: str = "grounding"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import grounding

        return grounding.evaluate(predictor, **self.given, batch_size=context.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes(AnnotatedRegions):
    """Classifies given boxes by the box head and by the region that overlaps each box most (`box_classes.evaluate`).

    Measures how often the right class has the best score, or one of the five best.

    Options: those of AnnotatedImages, `classes`, `templates`.

    Result: under `box_head`, under `region` and, for comparison, under `image` (by the image embedding): `top1`,
    `top5`, `mean_per_class`, `per_class`; the same under `found_boxes` and `groups`; `found`, `best_iou`, `chance`,
    `chance_top5`. A model without a box head or without regions has no `box_head` or `region`.
    """

    kind: str = "boxes"
    # File of class names, or the name of one in grain_jax/evaluate/classes; None: the distinct descriptions.
    classes: str | None = None
    templates: str | None = None  # file of prompts; None: inference/templates.txt

    @property
    def files(self) -> tuple[str | None, ...]:
        return self.annotations, self.templates, self.classes

    def read(self) -> "Annotated":
        from grain_jax.evaluate import annotated

        return annotated.read_regions(
            **self.given, expected="boxes with class names as descriptions"
        )

    def check(self) -> int:
        from grain_jax.evaluate import class_names
        from grain_jax.inference import prompts

        attempt = _Attempts()
        attempt(prompts.load_templates, _at_home(self.templates))
        if self.classes is not None:
            attempt(class_names.read, self.classes)
        return self._check(attempt)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import box_classes

        return box_classes.evaluate(
            predictor,
            **self.given,
            classes=self.classes,
            templates=_at_home(self.templates),
            batch_size=context.batch_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearMisses(AnnotatedImages):
    """Compares given boxes with their descriptions and their hard negatives (`near_misses.evaluate`).

    Measures how often the right description is nearer to the box than all of its negatives (FG-OVD).

    Options: those of AnnotatedImages, `negatives`.

    Result: under `box_head`, `region` and `image`, as the model has them: `top1`, `mean_rank`, `median_rank`; `chance`,
    `chance_mean_rank`.
    """

    kind: str = "near_misses"
    # Negatives of a box that are used; boxes with fewer are left out.
    negatives: int = dataclasses.field(default=10, metadata={"low": 1})

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import near_misses

        return near_misses.evaluate(
            predictor,
            **self.given,
            negatives=self.negatives,
            batch_size=context.batch_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps(AnnotatedImages):
    """Compares the similarity map of each phrase with its boxes (`maps.evaluate`).

    Measures whether the highest place of the map lies in a box of the phrase (the pointing game), and how well the part
    of the image where the map is high is that of the boxes.

    Options: those of AnnotatedImages.

    Result: `pointing`, `map_iou`, each with the prefix `chance_`; `map_iou_threshold`.
    """

    kind: str = "maps"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import maps

        return maps.evaluate(predictor, **self.given, batch_size=context.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostics(AnnotatedRegions):
    """Diagnostics of the region queries (`diagnostics.evaluate`, docs/diagnostics.md).

    Measures where each query predicts boxes, what it is matched to, and how many regions keep their query from one
    evaluation of a run to the next.

    Options: those of AnnotatedImages.

    Result: `matched_iou`, `matched_iou50`, `region_to_description_r1` and `_r5`, `query_usage_entropy`,
    `description_entropy`; in a run, from the second evaluation on, `matching_stability`; under `query` the numbers
    of each query.
    """

    kind: str = "diagnostics"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import diagnostics

        return diagnostics.evaluate(
            predictor,
            **self.given,
            batch_size=context.batch_size,
            state_path=context.state_path,
            step=context.step,
        )


def _at_home(path: str | None) -> str | None:
    """The path with `~` expanded; None stays None."""
    return path and expanduser(path)


class _Attempts:
    """Calls functions and collects their faults, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.found: list[Exception] = []

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return function(*arguments)
        except (errors.UserError, OSError) as error:
            self.found.append(error)
            return None

    def done(self) -> None:
        """Raises the collected faults, if there are any.

        Raises:
          errors.MissingData: the only fault is one.
          errors.UserError: one line per fault; `__cause__` is the original error if there is only one.
        """
        if len(self.found) == 1 and isinstance(self.found[0], errors.MissingData):
            raise self.found[0]
        if self.found:
            lines = dict.fromkeys(line for error in self.found for line in str(error).split("\n"))
            cause = self.found[0] if len(self.found) == 1 else None
            raise errors.UserError("\n".join(lines)) from cause
