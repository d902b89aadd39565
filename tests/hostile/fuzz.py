"""python -m tests.hostile.fuzz --minutes M [--seed S] [--kinds lines images ...]: a seeded fuzzer.

Each case damages one good input and gives it to what reads it. A case may end in the result of the good input, or in a
UserError of plain lines. It fails on any other exception (a traceback), after SECONDS (a hang), or where another result
comes out of damaged bytes that carry a digest (a silent difference). Status 1 where a case failed; its kind and seed
are printed, and `--kinds KIND --seed SEED --cases 1` runs it again.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import errors, images
from grain_jax.data import sources
from grain_jax.input_pipeline import file_tokenizer, records
from grain_jax.report import run_files
from grain_jax.runtime import checkpoint
from tests import perturbed, record_sets, tiny
from tests.hostile import image_files, indexes, source_files

SECONDS = 30.0
RECORDS = 16
NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "a" * 10**5,
    "\u202eabc\ud83d\ude00$x$\n\x1b[2J",
    "../../etc/passwd",
    [],
    {},
    [[[[]]]],
    {"a": {"b": {}}},
)


PICTURES = [
    image_files.encode(x, size) for x in image_files.FORMATS for size in ((24, 16), (61, 47))
]
PICTURES += [image_files.encode("TIFF", compression=f"tiff_{x}") for x in ("lzw", "deflate")]
PICTURES += [image_files.encode("TIFF", compression="jpeg"), image_files.webp_animated(2)]
PICTURES += [
    image_files.encode("JPEG", progressive=True),
    image_files.encode("WEBP", lossless=True),
]


class Hang(Exception):
    """A case took longer than SECONDS."""


class SilentDifference(Exception):
    """Damaged input gave another result than the good one, and nothing was said."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after so many seconds."""

    def end(*_):
        raise Hang(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def put_somewhere(value: Any, rng: random.Random) -> Any:
    """`value` (JSON) with one part replaced, removed, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        how = rng.randrange(6)
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return {**value, rng.choice(("", "x", key + "s", key.upper())): value[key]}
        return {**value, key: put_somewhere(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        how = rng.randrange(5)
        if how == 0:
            return value * 2
        if how == 1:
            return value[:at]
        return [*value[:at], put_somewhere(value[at], rng), *value[at + 1 :]]
    return rng.choice(NASTY)


def dump(value: Any) -> bytes:
    """JSON as a hostile writer would: NaN and lone surrogates stay in it."""
    return json.dumps(value).encode()


def write_tokenizers(json_file: pathlib.Path, model_file: pathlib.Path) -> None:
    """A tokenizer.json with every part that lengthens a text, and a SentencePiece model."""
    import sentencepiece
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["[U]", "[E]", "a", "red", "bird", "(", ")"])}
    library = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[U]"))
    replaced = normalizers.Replace(tokenizers.Regex(" {2,}"), "\u2581")
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), replaced, normalizers.Strip()])
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]
    )
    library.post_processor = processors.TemplateProcessing("$A [E]", None, [("[E]", 1)])
    library.add_special_tokens(["[E]"])
    library.save(str(json_file))
    texts = [f"a red bird {i} of {i * i} feathers" for i in range(99)]
    options = dict(vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    with io.BytesIO() as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, **options
        )
        model_file.write_bytes(out.getvalue())


class Fuzzer:
    """Good inputs in a folder of its own, and a method `case_KIND(rng)` for each kind of damage."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        record_sets.write_annotations(folder / "images", RECORDS)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert record_sets.build_set(folder / "images", folder / "data", "--num-shards=4") == 0
            self.samples = source_files.write(folder / "sources")
        found = (folder / "sources").rglob("*.json")
        self.good = {path: json.loads(path.read_bytes()) for path in found}
        source = dict(
            input__source="records", input__data_dir=str(folder / "data"), input__name="tiny_set"
        )
        self.config = tiny.config(**source)
        self.batch = next(records.batches(self.config))
        model = perturbed.tiny()
        checkpoint.save_model(folder / "model", model, perturbed.params(model))
        self.model = checkpoint.load_model(folder / "model")[:2]
        self.tokenizers = [folder / "t.json", folder / "t.model"]
        write_tokenizers(*self.tokenizers)
        (folder / "run").mkdir()
        lines = [{"step": i, "loss": 1.0 / i, "eval/seen/top1": 0.1 * i} for i in range(1, 9)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "run" / "metrics.jsonl").write_text(text)
        (folder / "run" / "config.json").write_text(config_lib.to_json(self.config))
        self.index, _ = indexes.search(indexes.write(folder / "index"))

    def case_lines(self, rng: random.Random) -> str:
        """An annotation file with one damaged line, through data.build."""
        lines = [dump(record_sets.annotation(i)) for i in range(4)]
        at = rng.randrange(len(lines))
        if rng.random() < 0.5:
            lines[at] = dump(put_somewhere(json.loads(lines[at]), rng))
        else:
            lines[at] = image_files.mutate(lines[at], rng.randrange(1 << 30))
        path = self.folder / "images" / "A.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                status = record_sets.build_set(
                    self.folder / "images",
                    self.folder / "out",
                    "--num-shards=1",
                    "--max-faults=1",
                    "--overwrite",
                )
            except SystemExit as end:
                status = end.code
        if status not in (0, 2):
            raise AssertionError(f"status {status}")
        return "read" if status == 0 else "refused"

    def case_images(self, rng: random.Random) -> str:
        """A damaged image file; no digest protects it, so that it may be read as another one."""
        encoded = rng.choice(PICTURES)
        picture = images.decode_image(image_files.mutate(encoded, rng.randrange(1 << 30)), "a")
        images.to_rgb(picture)
        return "read"

    def case_shards(self, rng: random.Random) -> str:
        """A damaged file of a record set, read as training does."""
        files = sorted(x for x in (self.folder / "data").rglob("*") if x.is_file())
        path = rng.choice(files)
        with damaged(path, rng):
            batch = next(records.batches(self.config))
        for name, before, after in zip(self.batch._fields, self.batch, batch, strict=True):
            if not np.array_equal(before, after):
                if (
                    path.suffix == ".json"
                ):  # names and counts that fit: another set, not a damaged one
                    return "read as another set"
                raise SilentDifference(f"{path.name}: {name}")
        return "the same"

    def case_checkpoints(self, rng: random.Random) -> str:
        """A damaged file of a model's folder."""
        files = [x for x in (self.folder / "model").rglob("*") if x.is_file()]
        files = sorted(x for x in files if x.stat().st_size)
        with damaged(rng.choice(files), rng) as path:
            model, params, _ = checkpoint.load_model(self.folder / "model")
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(self.model[1]), strict=True)
        if model != self.model[0] or not all(np.array_equal(a, b) for a, b in pairs):
            raise SilentDifference(path.name)
        return "the same"

    def case_configs(self, rng: random.Random) -> str:
        """A config with one or two damaged values."""
        value = dataclasses.asdict(self.config)
        for _ in range(rng.choice((1, 1, 2))):
            value = put_somewhere(value, rng)
        config_lib.from_dict(value)
        return "read"

    def case_workdirs(self, rng: random.Random) -> str:
        """Damaged metrics or config of a workdir, read as the report does."""
        path = self.folder / "run" / rng.choice(("metrics.jsonl", "config.json"))
        if rng.random() < 0.5:
            with damaged(path, rng):
                run_files.read(self.folder / "run")
            return "read"
        before = path.read_bytes()
        lines = before.splitlines() if path.suffix == ".jsonl" else [before]
        at = rng.randrange(len(lines))
        lines[at] = dump(put_somewhere(json.loads(lines[at]), rng))
        try:
            path.write_bytes(b"\n".join(lines) + b"\n")
            run_files.read(self.folder / "run")
        finally:
            path.write_bytes(before)
        return "read"

    def case_sources(self, rng: random.Random) -> str:
        """A damaged annotation file of a public format, read as data.annotate does."""
        name = rng.choice(sorted(self.samples))
        options = self.samples[name]
        path = rng.choice(source_files.annotation_files(self.folder / "sources" / name, options))
        with damaged(path, rng):
            if path.suffix == ".json" and rng.random() < 0.7:
                if path.is_dir():
                    path.rmdir()
                path.write_bytes(dump(put_somewhere(self.good[path], rng)))
            shards = sources.shards(name, options)
            items = [item for shard in shards for item in sources.read(shard)]
        faults = [x for x in items if isinstance(x, sources.Fault)]
        if not {x.cause for x in faults} <= set(sources.CAUSES):
            raise AssertionError(faults)
        return "refused" if faults else "read"

    def case_indexes(self, rng: random.Random) -> str:
        """A folder of embeddings with one damaged file, searched, read for the page and gone on with."""
        folder = self.folder / "index"
        files = [folder / "settings.json", *sorted((folder / "data").iterdir())]
        with indexes.kept(folder):
            if changed := rng.random() < 0.6:
                indexes.change(folder, rng, put_somewhere)
            with damaged(rng.choice(files), rng) if not changed else contextlib.nullcontext():
                try:
                    found, missing = indexes.search(folder)
                finally:
                    indexes.resume(folder)
        if found != self.index and not changed and not missing:
            raise SilentDifference("search")
        return "the same" if found == self.index else "read as another or an unfinished index"

    def case_tokenizers(self, rng: random.Random) -> str:
        """A damaged tokenizer.json or SentencePiece .model, read and used on texts."""
        path = rng.choice(self.tokenizers)
        before = path.read_bytes()
        if path.suffix == ".model" or rng.random() < 0.3:
            content = image_files.mutate(before, rng.randrange(1 << 30))
        else:
            value = json.loads(before)
            for _ in range(rng.choice((1, 1, 2, 3))):
                value = put_somewhere(value, rng)
            content = dump(value)
        try:
            path.write_bytes(content)
            found = file_tokenizer.FileTokenizer(path, rng.choice(("lower", "canonical", "none")))
            ids = found(["a red bird", "", "x " * 99, "\u00e9\ufb01 (\U0001f426)"], 16)
        finally:
            path.write_bytes(before)
        assert ids.shape == (4, 16) and 0 <= ids.min() <= ids.max() < max(1, found.vocab_size)
        return "read"


KINDS = tuple(name.removeprefix("case_") for name in dir(Fuzzer) if name.startswith("case_"))


@contextlib.contextmanager
def damaged(path: pathlib.Path, rng: random.Random) -> Iterator[pathlib.Path]:
    """The file with changed bytes, cut, empty, gone, or a folder in its place; it is put back after the block."""
    before, how = path.read_bytes(), rng.randrange(10)
    if how < 7:
        changed = image_files.mutate(before, rng.randrange(1 << 30)) if before else b"x"
        path.write_bytes(changed)
    elif how == 7:
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == 9:
            path.mkdir()
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.write_bytes(before)


def run_case(case: Callable[[random.Random], str], seed: int) -> tuple[str, str | None]:
    """(outcome, None), or ("traceback", "hang" or "silent difference", what it was)."""
    try:
        with limit(SECONDS):
            return case(random.Random(seed)), None
    except errors.UserError as error:
        if "Traceback" in str(error):
            return "traceback", str(error)
        return "refused", None
    except Hang as error:
        return "hang", str(error)
    except SilentDifference as error:
        return "silent difference", str(error)
    except Exception:
        return "traceback", traceback.format_exc()


def fuzz(
    fuzzer: Fuzzer, kinds: tuple[str, ...], seed: int, *, minutes: float = 0.0, cases: int = 0
) -> tuple[collections.Counter, list[str]]:
    """Runs cases of the kinds in turn until time or number is up; (outcomes by kind, failures)."""
    outcomes: collections.Counter = collections.Counter()
    failures, end, number = [], time.monotonic() + 60 * minutes, 0
    logging.disable(logging.WARNING)
    while number < cases if cases else time.monotonic() < end:
        kind = kinds[number % len(kinds)]
        outcome, what = run_case(getattr(fuzzer, f"case_{kind}"), seed + number)
        outcomes[kind, outcome] += 1
        if what is not None:
            failures.append(f"{kind}, seed {seed + number}: {outcome}: {what}")
            print(failures[-1], file=sys.stderr, flush=True)
        number += 1
    logging.disable(logging.NOTSET)
    return outcomes, failures


def main() -> int:
    """Parses the command line and fuzzes."""
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cases", type=int, default=0, help="so many cases instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    how_long = dict(minutes=args.minutes, cases=args.cases)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(pathlib.Path(folder))
        outcomes, failures = fuzz(fuzzer, tuple(args.kinds), args.seed, **how_long)
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:12} {outcome:20} {count:8,}")
    names = ("traceback", "hang", "silent difference")
    totals = {name: sum(n for (_, o), n in outcomes.items() if o == name) for name in names}
    print(f"{sum(outcomes.values()):,} cases, seed {args.seed}; {totals}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
