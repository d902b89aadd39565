"""Damaged input of every kind gives the result of the good input, or one plain line."""

import contextlib
import dataclasses
import json
import pathlib
import random
import shutil

import hypothesis
import jax
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.core import errors, images
from grain_jax.data import example, sources
from grain_jax.input_pipeline import records, tokenizer, transforms
from tests import perturbed, record_sets, tiny
from tests.data import test_sources
from tests.hostile import image_files

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")
NASTY = (
    *(None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf")),
    *("", "\0", "a" * 10**5, "\u202eabc\ud83d\ude00$x$\n\x1b[2J", "../../etc/passwd"),
    *([], {}, [[[[]]]], {"a": {"b": {}}}),
)
PICTURES = [image_files.encode(kind) for kind in image_files.FORMATS]
PICTURES += [image_files.encode("TIFF", compression="tiff_lzw"), image_files.webp_animated(2)]
PICTURES += [image_files.encode("JPEG", (61, 47), progressive=True)]


def put_somewhere(value, rng):
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
        index = rng.randrange(len(value))
        how = rng.randrange(5)
        if how < 2:
            return value * 2 if how else value[:index]
        return [*value[:index], put_somewhere(value[index], rng), *value[index + 1 :]]
    return rng.choice(NASTY)


@contextlib.contextmanager
def damaged(path, rng):
    """The file with changed bytes, cut, empty, gone, or a folder; it is put back after the block."""
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
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.write_bytes(before)


def write_tokenizer(folder):
    """A tokenizer.json with every part that lengthens a text."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[U]", "[E]", "a", "red", "bird", "(", ")"])}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    replaced = normalizers.Replace(tokenizers.Regex(" {2,}"), "\u2581")
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), replaced, normalizers.Strip()])
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]
    )
    library.post_processor = processors.TemplateProcessing("$A [E]", None, [("[E]", 1)])
    library.add_special_tokens(["[E]"])
    library.save(str(folder / "t.json"))
    return folder / "t.json"


class Good:
    """Good inputs in a folder, and for each kind a method that damages one and reads it."""

    def __init__(self, folder):
        self.folder = folder
        record_sets.write_annotations(folder / "images", 16)
        assert record_sets.build_set(folder / "images", folder / "data", "--num-shards=4") == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_sources, "COUNT", 2)  # images of a sample
            samples = test_sources.SAMPLES.items()
            self.samples = {name: make(folder / "sources" / name) for name, make in samples}
        source = dict(input__source="records", input__data_dir=str(folder / "data"), input__name="tiny_set")
        self.config = tiny.config(**source)
        self.batch = next(records.batches(self.config))
        model = perturbed.tiny()
        saved_model.save_model(folder / "model", model, perturbed.params(model))
        self.model = saved_model.load_model(folder / "model")[:2]
        self.tokenizer = write_tokenizer(folder)

    def lines(self, rng):
        lines = [json.dumps(record_sets.annotation(i)).encode() for i in range(4)]
        index = rng.randrange(len(lines))
        if rng.random() < 0.5:
            lines[index] = json.dumps(put_somewhere(json.loads(lines[index]), rng)).encode()
        else:
            lines[index] = image_files.mutate(lines[index], rng.randrange(1 << 30))
        (self.folder / "images" / "A.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        flags = ("--num-shards=1", "--max-faults=1", "--overwrite")
        assert record_sets.build_set(self.folder / "images", self.folder / "out", *flags) in (0, 2)

    def images(self, rng):
        encoded = image_files.mutate(rng.choice(PICTURES), rng.randrange(1 << 30))
        images.to_rgb(images.decode_image(encoded, "a"))

    def shards(self, rng):
        path = rng.choice(sorted(x for x in (self.folder / "data").rglob("*") if x.is_file()))
        with damaged(path, rng):
            batch = next(records.batches(self.config))
        if path.suffix != ".json":  # names and counts that fit are another set, not a damaged one
            jax.tree.map(np.testing.assert_array_equal, batch, self.batch)

    def checkpoints(self, rng):
        files = [x for x in (self.folder / "model").rglob("*") if x.is_file() and x.stat().st_size]
        with damaged(rng.choice(sorted(files)), rng):
            model, params, _ = saved_model.load_model(self.folder / "model")
        assert model == self.model[0]
        jax.tree.map(np.testing.assert_array_equal, params, self.model[1])

    def configs(self, rng):
        config_lib.from_dict(put_somewhere(dataclasses.asdict(self.config), rng))

    def sources(self, rng):
        name = rng.choice(sorted(self.samples))
        options = self.samples[name]
        files = (x for x in (self.folder / "sources" / name).rglob("*") if x.is_file())
        lists = pathlib.Path(options.scratch)
        kept = [x for x in files if x.suffix != ".jpg" and lists not in x.parents]
        path = rng.choice(sorted(kept))
        good = json.loads(path.read_bytes()) if path.suffix == ".json" else None
        with damaged(path, rng):
            if good is not None and path.is_file() and rng.random() < 0.7:
                path.write_text(json.dumps(put_somewhere(good, rng)))
            items = [x for shard in sources.shards(name, options) for x in sources.read(shard)]
        faults = [x for x in items if isinstance(x, sources.Fault)]
        assert {x.cause for x in faults} <= set(sources.CAUSES)
        if faults:
            raise errors.UserError("refused")

    def tokens(self, rng):
        path = self.tokenizer
        before = path.read_bytes()
        content = image_files.mutate(before, rng.randrange(1 << 30))
        if rng.random() < 0.7:
            content = json.dumps(put_somewhere(json.loads(before), rng)).encode()
        try:
            path.write_bytes(content)
            found = tokenizer.FileTokenizer(path, rng.choice(("lower", "canonical", "none")))
            ids = found(["a red bird", "", "x " * 99, "\u00e9\ufb01 (\U0001f426)"], 16)
        finally:
            path.write_bytes(before)
        assert ids.shape == (4, 16) and 0 <= ids.min() <= ids.max() < max(1, found.vocab_size)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return Good(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize(
    "kind, cases",
    [
        *(("lines", 8), ("images", 400), ("shards", 8), ("checkpoints", 20)),
        *(("configs", 30), ("sources", 50), ("tokens", 30)),
    ],
)
def test_damaged_input_is_read_or_refused_in_plain_lines(good, kind, cases):
    refused = []

    @hypothesis.settings(max_examples=cases, derandomize=True, deadline=None, database=None)
    @hypothesis.given(st.integers(0, 2**32))
    def read(seed):
        try:
            getattr(good, kind)(random.Random(f"{kind} {seed}"))
        except errors.UserError as error:
            refused.append(seed)
            assert "Traceback" not in str(error) and "\x1b" not in str(error)

    read()
    assert len(refused) < cases and (refused or kind == "lines")


def test_no_mutated_image_is_accepted_that_training_refuses():
    original, accepted, rescued = example.Encoding("original"), 0, 0
    for number in range(200):
        encoded = image_files.mutate(image_files.encode("PNG"), number)
        try:
            picture = images.decode_image(encoded)
        except images.ImageError:
            continue
        stored = example.encode_image(picture, encoded, original)
        decoded = transforms.decode(tf.constant(stored)).numpy()  # raises where training would
        assert decoded.shape == (picture.height, picture.width, 3)
        accepted, rescued = accepted + 1, rescued + (stored != encoded)
    assert accepted > 20
    assert rescued > 10
