"""Trains GRAIN with a text decoder on the aviary, measures it, shows what it writes about ten test images:

    python -m examples.captioner --workdir runs/captioner

It draws the aviary, makes a tokenizer of its words, and trains; the same command again resumes. Then it
prints the results of `evaluator.Written` and writes WORKDIR/captions.png: each image with its caption and the
box of one phrase (dashed: the annotated box). This takes some 20 minutes on two CPU cores.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import textwrap
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
    known = {word for text in cleaned for word, _ in split.pre_tokenize_str(text)}
    ids = {word: i for i, word in enumerate([*config.SPECIALS, *sorted(known)])}
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
    shown = [images.load_image(folder / record.image) for record in records]
    tokens = writer.image_tokens(shown)
    captions = writer.captions(tokens)
    phrases = [record.regions[0].description for record in records]
    boxes = writer.boxes(tokens, phrases) * [image.size * 2 for image in shown]
    figure = Figure(figsize=(20, 9.5))
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.9, wspace=0.1, hspace=0.3)
    for i, axis in enumerate(figure.subplots(2, SHOWN // 2).flat):
        axis.imshow(shown[i])
        for corners, style in ((boxes[i], "-"), (records[i].regions[0].box_xyxy, "--")):
            x, y, right, bottom = corners
            frame = dict(fill=False, edgecolor="red", linewidth=2, linestyle=style)
            axis.add_patch(patches.Rectangle((x, y), right - x, bottom - y, **frame))
        title = f"{textwrap.fill(captions[i], 48)}\nbox: {phrases[i]}"
        axis.set_title(title, fontsize=10)
        axis.axis("off")
        print(f"{records[i].image}: {captions[i]}; {phrases[i]} at {boxes[i].round().tolist()}")
    figure.savefig(output)
    print(output)


def main() -> int:
    """Trains, measures and draws; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.captioner", description=__doc__, formatter_class=raw)
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
