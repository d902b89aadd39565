"""Data of the fifth design: aviaries and clothes with a tokenizer of their own words, and the sets of the second round."""

import json
import pathlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping

from benchmarks.claim import data, dense, dense_data, design, words
from benchmarks.claim.results import ClaimError
from grain_jax.core import annotations, atomic
from grain_jax.data import build, example
from grain_jax.input_pipeline import text_cleaning

ANNOTATIONS = "A.jsonl"


def prepare(name: str, clothes: pathlib.Path | None, work: pathlib.Path) -> pathlib.Path:
    """Makes the images, annotations, views and tokenizer of a data set, unless they exist; returns its folder.

    Args:
      name: `words.MAIN`, `words.POSES` or `words.CLOTHES`; those of the second round have the images of another one.
      clothes: folder that `python -m benchmarks.fetch fashion` made.
      work: folder for all output.
    """
    name = words.images_of(name)
    views = work / "views" / name
    if name == words.CLOTHES:
        main = data.prepare(name, clothes, work)
        divide_clothes(main, views)
    else:
        main = dense_data.prepare_aviary(name, words.AVIARIES[name], work)
    tokenizer = views / words.TOKENIZER
    if not tokenizer.exists():
        library = make_tokenizer(_texts(main / ANNOTATIONS))
        missing = unknown(library, _test_texts(main))
        line = f"{name}: {library.get_vocab_size()} ids; words of test texts that are unknown: {len(missing)}"
        print(line, *missing[:10], file=sys.stderr)
        atomic.write_text(tokenizer, library.to_str(pretty=True))
    return main


def divide_clothes(main: pathlib.Path, views: pathlib.Path) -> None:
    """Divides the test images of clothes in turn, those of seen and of unseen kinds: both_SPLIT.jsonl, unseen_SPLIT.jsonl."""
    for i, split in enumerate(dense.SPLITS):
        lines = {
            group: (main / "test" / f"{group}.jsonl").read_text().splitlines(keepends=True)[i::2]
            for group in ("seen", "unseen")
        }
        (views / f"unseen_{split}.jsonl").write_text("".join(lines["unseen"]))
        (views / f"both_{split}.jsonl").write_text("".join(lines["seen"] + lines["unseen"]))


def make_tokenizer(texts: Iterable[str]):
    """A tokenizer (of the library tokenizers) of the words of texts, as the cleaning "lower" leaves them.

    A word is letters, a digit alone, or signs; START and END stand around a text. The words have the ids behind those of
    `words.SPECIALS`, in the order of the alphabet.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    cleaned = text_cleaning.clean_all(list(texts))
    found = {word for text in set(cleaned) for word, _ in split.pre_tokenize_str(text)}
    ids = {word: i for i, word in enumerate([*words.SPECIALS, *sorted(found)])}
    library = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=words.UNKNOWN))
    library.pre_tokenizer = split
    library.add_special_tokens(list(words.SPECIALS))
    library.post_processor = processors.TemplateProcessing(
        single=f"{words.START} $A {words.END}",
        special_tokens=[(one, ids[one]) for one in (words.START, words.END)],
    )
    return library


def unknown(library, texts: Iterable[str]) -> list[str]:
    """The words of texts that a tokenizer does not know, sorted."""
    known = library.get_vocab()
    split = library.pre_tokenizer.pre_tokenize_str
    cleaned = text_cleaning.clean_all(list(texts))
    return sorted({word for text in set(cleaned) for word, _ in split(text)} - known.keys())


def _texts(path: pathlib.Path) -> Iterator[str]:
    """Captions and descriptions of a file."""
    for record in annotations.read(path).records:
        yield from filter(None, (*record.captions, record.synthetic_caption))
        for region in record.regions:
            yield region.description


def _test_texts(main: pathlib.Path) -> Iterator[str]:
    """All texts of the tests but the names of classes."""
    path = main / "test" / ANNOTATIONS
    yield from _texts(path)
    for record in annotations.read(path).records:
        for region in record.regions:
            yield from region.negatives
    for said in json.loads((main / "unseen.json").read_text()).values():
        yield from said


def prepare_records(run: design.ClaimRun, main: pathlib.Path, work: pathlib.Path) -> None:
    """Makes the records of a run of the second round, unless they exist; those of others are made with their images.

    A tenth has the true lines of one image in `words.SHARE`, the same for all seeds. Of ANNOTATED the model of the same
    seed that learnt from them annotates the other images, of which it is given nothing but the pixels.

    Args:
      run: of this design.
      main: folder of its images.
      work: folder for all output, with the finished run of the tenth.
    """
    name = words.records_of(run)
    has_own = words.images_of(run.data) != run.data
    if not has_own or (work / "records" / name / example.VERSION).exists():
        return
    folder = work / "second_round" / name
    folder.mkdir(parents=True, exist_ok=True)
    true, others = divide(main / ANNOTATIONS)
    if run.data == words.ANNOTATED:
        from grain_jax.data.annotate import __main__ as annotate  # Beam takes seconds

        source = folder / "images.jsonl"
        source.write_text("".join(others))
        model = work / "runs" / words.run_of(run.arm, run.seed, run.steps, words.TENTH).name
        flags = annotate_flags(source, main, folder / "own", model)
        if annotate.main(flags):
            raise ClaimError(f"{folder}: could not be annotated by {model}")
        true += (folder / "own" / ANNOTATIONS).read_text().splitlines(keepends=True)
    union = folder / ANNOTATIONS
    union.write_text("".join(true))
    places = {"annotations": union, "images": main, "output": work / "records", "name": name}
    if build.main([f"--{key}={value}" for key, value in places.items()]):
        raise ClaimError(f"{union}: could not be built")


def divide(path: pathlib.Path) -> tuple[list[str], list[str]]:
    """The lines of a file that stay, one in `words.SHARE`, and of the others lines with the image alone."""
    lines = path.read_text().splitlines(keepends=True)
    kept = set(random.Random(0).sample(range(len(lines)), len(lines) // words.SHARE))
    others = (json.loads(line)["image"] for i, line in enumerate(lines) if i not in kept)
    bare = [json.dumps({"image": image}) + "\n" for image in others]
    return [line for i, line in enumerate(lines) if i in kept], bare


def annotate_flags(
    source: pathlib.Path, images: pathlib.Path, output: pathlib.Path, model: pathlib.Path
) -> list[str]:
    """The flags of `grain-jax annotate` for these lines."""
    given: Mapping[str, object] = {
        "source": "annotations",
        "annotations": source,
        "images": images,
        "output": output,
        "model": model,
        **words.ANNOTATE,
    }
    return [f"--{key}={value}" for key, value in given.items()]
