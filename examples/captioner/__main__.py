"""Trains GRAIN with a text decoder on the aviary, measures it, and shows what it writes about ten test images:

    python -m examples.captioner --workdir runs/captioner

It draws the aviary and a tokenizer of its words, trains (the same command again goes on), prints the results of
`evaluator.Written`, and writes WORKDIR/captions.png: each image with its caption, and the box of one phrase (dashed:
the annotated one). Some 20 minutes on two CPU cores.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable

import tokenizers
from matplotlib import patches
from matplotlib.figure import Figure
from tokenizers import models, pre_tokenizers, processors

import grain_jax
from examples.captioner import config
from examples.captioner.evaluator import Written
from examples.captioner.writer import Writer
from grain_jax.core import annotations, atomic, images
from grain_jax.data.aviary import __main__ as aviary
from grain_jax.input_pipeline import text_cleaning

SHOWN = 10  # images


def make_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A tokenizer of the words and signs of these texts, each text between [START] and [END]."""
    split = pre_tokenizers.Whitespace()
    cleaned = set(text_cleaning.clean_all(list(texts)))
    words = {word for text in cleaned for word, _ in split.pre_tokenize_str(text)}
    ids = {word: i for i, word in enumerate([*config.SPECIALS, *sorted(words)])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[UNKNOWN]"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(list(config.SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[(x, ids[x]) for x in ("[START]", "[END]")]
    )
    return tokenizer


def texts_of(path: pathlib.Path) -> Iterable[str]:
    """All captions and descriptions of a file."""
    for record in annotations.read(path).records:
        yield from (*record.captions, record.synthetic_caption)
        yield from (region.description for region in record.regions)


def draw(writer: Writer, folder: pathlib.Path, output: pathlib.Path) -> None:
    """Draws the first test images with their captions, and of each the box of its first phrase."""
    records = annotations.read(folder / "A.jsonl").records[:SHOWN]
    pictures = [images.load_image(folder / record.image) for record in records]
    tokens = writer.image_tokens(pictures)
    captions = writer.captions(tokens)
    phrases = [record.regions[0].description for record in records]
    figure = Figure(figsize=(20, 10), layout="constrained")
    shown = zip(figure.subplots(2, SHOWN // 2).flat, pictures, records, captions, phrases)
    for (axis, picture, record, caption, phrase), box in zip(shown, writer.boxes(tokens, phrases)):
        axis.imshow(picture)
        width, height = picture.size
        written = [x * side for x, side in zip(box, (width, height) * 2)]
        for corners, style in ((written, "-"), (record.regions[0].box_xyxy, "--")):
            x, y, right, bottom = corners
            frame = dict(fill=False, edgecolor="red", linewidth=2, linestyle=style)
            axis.add_patch(patches.Rectangle((x, y), right - x, bottom - y, **frame))
        axis.set_title(f"box: {phrase}", fontsize=9, color="red")
        axis.text(0.5, -0.02, caption, fontsize=9, ha="center", va="top", wrap=True)
        axis.texts[-1].set_transform(axis.transAxes)
        axis.axis("off")
        print(f"{record.image}: {caption}; {phrase} at {[round(float(x)) for x in written]}")
    figure.savefig(output)
    print(output)


def main() -> int:
    """Trains, measures and draws; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m examples.captioner", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/captioner", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="--config.KEY=VALUE")
    args, more = parser.parse_known_args()
    data, run = args.workdir / "aviary", args.workdir / "run"
    if status := aviary.main([f"--output={data}", f"--records={data}/records"]):
        return status
    tokenizer = make_tokenizer(texts_of(data / "A.jsonl")).to_str(pretty=True)
    atomic.write_text(data / config.TOKENIZER, tokenizer)
    file = pathlib.Path(config.__file__)
    command = ["train", f"--config={file}:{data}", f"--workdir={run}", *args.overrides, *more]
    if status := subprocess.run([sys.executable, "-m", "grain_jax", *command]).returncode:
        return status
    predictor = grain_jax.load(run)
    test = data / "test"
    measured = Written(images=str(test), annotations=str(test / "A.jsonl")).evaluate(predictor)
    atomic.write_text(args.workdir / "words.json", json.dumps(measured, indent=1) + "\n")
    print(*(f"{key} {value:.3f}" for key, value in measured.items()), sep="\n")
    draw(Writer(predictor), test, args.workdir / "captions.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
