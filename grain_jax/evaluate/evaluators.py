"""The evaluators of the package: their options, what they need, and the function that computes each.

This module imports nothing beyond `config`, so that a config is parsed without JAX, numpy or TensorFlow; the modules
that compute are imported by the methods. docs/evaluate.md describes the protocols and the results.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from grain_jax import config, errors
from grain_jax.config.evals import STANDALONE, Context, exists, expanduser, same_place

if TYPE_CHECKING:
    from grain_jax.evaluate.annotated import Annotated
    from grain_jax.evaluate.test_sets import TestSet

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages(config.Evaluator):
    """Images with classes: a folder with a sub-folder per class, or a set of TensorFlow Datasets."""

    images: str = ""  # class folders
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
        """The images; raises as test_sets.ClassFolders and test_sets.TfdsSet."""
        return self._open(self.images, self.split)

    def _open(self, folder: str, split: str) -> "TestSet":
        from grain_jax.evaluate import test_sets

        if self.tfds is None:
            return test_sets.ClassFolders(folder, self.classes, self.get)
        return test_sets.TfdsSet(self.tfds, split, self.data_dir, self.classes, self.get)

    def check(self) -> int:
        return len(self.open())


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedImages(config.Evaluator):
    """Images with annotations, `A.jsonl` (docs/annotate.md)."""

    images: str = ""  # folder that the paths of the annotations start from
    annotations: str | None = None  # A.jsonl

    @property
    def data(self) -> tuple[str | None, ...]:
        return self.annotations, self.images

    @property
    def files(self) -> tuple[str | None, ...]:
        return (self.annotations,)

    @property
    def paths(self) -> tuple[str, str]:
        """The folder and the annotations, with the user's home for `~`. Raises errors.UserError."""
        if self.annotations is None:
            raise errors.UserError(
                f"annotations: got nothing, expected a file (A.jsonl) for {self.kind}"
            )
        return expanduser(self.images), expanduser(self.annotations)

    def read(self) -> "Annotated":
        """The annotations with a region; raises as annotated.read."""
        from grain_jax.evaluate import annotated

        return annotated.read_regions(*self.paths)

    def check(self) -> int:
        return self._check(_Attempts())

    def _check(self, attempt: "_Attempts") -> int:
        """`check`, with the faults that `attempt` has caught already."""
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
    """Classification by class names and by descriptions of the classes."""

    kind: str = "zeroshot"
    descriptions: str | None = None  # D.json; None: class names alone
    # Shares of the global score; those below 1 count where there are descriptions.
    alphas: tuple[float, ...] = (1.0, 0.5)
    names: bool = True  # class names stand in the prompts; False: descriptions alone
    # The region score is a mean over "queries" (the paper) or over "descriptions".
    region_order: str = dataclasses.field(
        default="queries", metadata={"choices": ("queries", "descriptions")}
    )
    templates: str | None = None  # file of prompts; None: the general ones

    @property
    def needs_regions(self) -> bool:
        return bool(self.descriptions) and any(alpha < 1 for alpha in self.alphas)

    @property
    def files(self) -> tuple[str | None, ...]:
        return self.descriptions, self.templates, self.classes

    @property
    def shares(self) -> Sequence[float]:
        """The alphas that count: 1 alone without descriptions, but numbers that are no shares stay as faults."""
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
            templates=_at_home(self.templates),
            batch_size=context.batch_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(LabelledImages):
    """Classification by a logistic regression on image embeddings, also of few shots."""

    kind: str = "linear_probe"
    # Class folders of the training images, or their split of the TFDS set. None: a seeded share of `images`,
    # or "train".
    train: str | None = None
    shots: tuple[int, ...] = ()  # training images per class, a probe each; 0, and (): all
    seeds: int = dataclasses.field(default=5, metadata={"low": 1})  # draws of few shots

    def faults(self) -> list[str]:
        found = super().faults()
        if any(shots < 0 for shots in self.shots):
            found.append(f"shots: got {self.shots}, expected at least 1 each, or 0 for all")
        return found

    @property
    def data(self) -> tuple[str | None, ...]:
        return self.images, self.train

    def open_train(self) -> "TestSet | None":
        """The training images; None where `images` is to be split.

        Raises:
          errors.UserError: they are those of the test, or as `open`.
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
    """R@1, R@5, R@10 between images and captions, both ways."""

    kind: str = "retrieval"

    def read(self) -> "Annotated":
        from grain_jax.evaluate import annotated

        return annotated.read_captions(*self.paths)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import retrieval

        images, annotations = self.paths
        return retrieval.evaluate(
            predictor, images=images, annotations=annotations, batch_size=context.batch_size
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedRegions(AnnotatedImages):
    """Images whose annotations have boxes with descriptions."""

    @property
    def needs_regions(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grounding(AnnotatedRegions):
    """Box IoU, Acc@0.5, region-to-description R@1, phrase grounding."""

    kind: str = "grounding"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import grounding

        images, annotations = self.paths
        return grounding.evaluate(
            predictor, images=images, annotations=annotations, batch_size=context.batch_size
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes(AnnotatedRegions):
    """The class of a given box, by the region that overlaps it most."""

    kind: str = "boxes"
    # File of class names, or the name of one in grain_jax/evaluate/classes; None: the distinct descriptions.
    classes: str | None = None
    templates: str | None = None  # file of prompts; None: the general ones

    @property
    def files(self) -> tuple[str | None, ...]:
        return self.annotations, self.templates, self.classes

    def read(self) -> "Annotated":
        from grain_jax.evaluate import annotated

        return annotated.read_regions(*self.paths, "boxes with class names as descriptions")

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

        images, annotations = self.paths
        return box_classes.evaluate(
            predictor,
            images=images,
            annotations=annotations,
            classes=self.classes,
            templates=_at_home(self.templates),
            batch_size=context.batch_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostics(AnnotatedRegions):
    """Where each query looks, what it is matched to, and how many regions keep their query (docs/diagnostics.md)."""

    kind: str = "diagnostics"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        from grain_jax.evaluate import diagnostics

        images, annotations = self.paths
        return diagnostics.evaluate(
            predictor,
            images=images,
            annotations=annotations,
            batch_size=context.batch_size,
            state_path=context.state_path,
            step=context.step,
        )


def _at_home(path: str | None) -> str | None:
    """A path with the user's home for `~`."""
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
        """Raises what was found.

        Raises:
          errors.MissingData: it is the only fault.
          errors.UserError: one line a fault; `__cause__` is the error if there was one.
        """
        if len(self.found) == 1 and isinstance(self.found[0], errors.MissingData):
            raise self.found[0]
        if self.found:
            lines = dict.fromkeys(line for error in self.found for line in str(error).split("\n"))
            cause = self.found[0] if len(self.found) == 1 else None
            raise errors.UserError("\n".join(lines)) from cause
