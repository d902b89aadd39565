"""Plants what goes wrong in a crawl and at a server, each with the cause that it must be found by."""

import io
import json
import pathlib

import PIL.Image

from tests.data.annotate import endpoint

# Images of these widths are what a server has trouble with; all others have 64 pixels.
FIRST_WIDTH = 80
HEIGHT = 72
TIME_OUT = 3.0  # seconds that a request must not take

# A server's trouble: name -> (what it does, stage and cause of the dead letter, whether a line is left).
_TWO_LINES = endpoint.SUBJECT + endpoint.CAPTION
_SERVER = {
    "500": (endpoint.Reply("boom", status=500), "caption: server error", False),
    "time_out": (endpoint.Reply(_TWO_LINES, seconds=2 * TIME_OUT), "caption: time-out", False),
    "hang_up": (endpoint.Reply(hang_up=True), "caption: no connection", False),
    "429": (endpoint.Reply("slowly", status=429), "caption: rate limit", False),
    "400": (endpoint.Reply("too long", status=400), "caption: request rejected", False),
    "page": (endpoint.Reply(body=b"<html>"), "caption: no answer in the response", False),
    "garbage": (endpoint.Reply("\x00\ufffd%% 01 ]]"), "caption: run-on", False),
    "later_refusal": (endpoint.Reply("As an AI, I do not see."), "describe: refusal", True),
    "later_500": (endpoint.Reply("boom", status=500), "describe: server error", True),
}
SERVER = {f"server_{name}.png": (cause, kept) for name, (_, cause, kept) in _SERVER.items()}


def plant_files(folder: pathlib.Path) -> dict[str, str | None]:
    """Writes faulty images; returns by name the stage and cause, or None for what must be readable."""
    picture = PIL.Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 50).convert("RGB")
    jpeg, png = _encode(picture, "JPEG"), _encode(picture, "PNG")
    contents = {
        "file_truncated.jpg": (jpeg[: len(jpeg) // 2], "image: unreadable"),
        "file_truncated.png": (png[: len(png) // 2], "image: unreadable"),
        "file_empty.jpg": (b"", "image: empty file"),
        "file_text.jpg": (b"404 Not Found\n" * 9, "image: unreadable"),
        "file_1x1.png": (_encode(picture.resize((1, 1)), "PNG"), "image: too small"),
        "file_wide.jpg": (_encode(picture.resize((20_000, 40)), "JPEG"), "image: too large"),
        "file_bad_caption.jpg": (jpeg, "image: bad annotation"),
        # Other colours than RGB are no faults.
        "fine_cmyk.jpg": (_encode(picture.convert("CMYK"), "JPEG"), None),
        "fine_palette.gif": (_encode(picture.convert("P"), "GIF"), None),
        "fine_16_bits.png": (_encode(picture.convert("I;16"), "PNG"), None),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "file_bad_caption.txt").write_bytes(b"caf\xe9")
    (folder / "file_folder.jpg").mkdir()
    (folder / "file_gone.jpg").symlink_to(folder / "nowhere.jpg")
    causes = {name: cause for name, (_, cause) in contents.items()}
    return causes | {
        "file_folder.jpg": "image: unreadable",
        "file_gone.jpg": "image: no such file",
    }


def plant_pictures_for_server(folder: pathlib.Path) -> None:
    """Writes the good images that `reply` has trouble with."""
    for number, name in enumerate(SERVER):
        PIL.Image.new("RGB", (FIRST_WIDTH + number, HEIGHT), "teal").save(folder / name)


def reply(asked: endpoint.Asked) -> endpoint.Reply:
    """The server: right answers, but for the images that it has trouble with."""
    width, height = asked.picture.size
    if height == HEIGHT and 0 <= width - FIRST_WIDTH < len(_SERVER):
        trouble, cause, _ = list(_SERVER.values())[width - FIRST_WIDTH]
        asked_first = "Subject:" in asked.prompt
        if asked_first == cause.startswith("caption"):
            return trouble
    return endpoint.annotator(asked)


def check(
    output: pathlib.Path, images: list[str], expected: dict[str, str], kept: set[str]
) -> None:
    """Asserts that each image is there exactly once, and each dead letter has its cause.

    Args:
      output: of the job.
      images: all images of the source.
      expected: stage and cause of each faulty one.
      kept: the faulty ones that have a line all the same.
    """
    lines = [json.loads(line) for line in (output / "A.jsonl").read_text().splitlines()]
    letters = [json.loads(line) for line in (output / "failed.jsonl").read_text().splitlines()]
    annotated = [line["image"] for line in lines]
    assert len(annotated) == len(set(annotated)), "an image is there twice"
    assert set(annotated) == set(images) - set(expected) | kept
    stages = {letter["image"]: f"{letter['stage']}: {letter['cause']}" for letter in letters}
    assert len(stages) == len(letters), "an image has two dead letters"
    assert stages == expected
    assert {letter["image"] for letter in letters if letter["kept"]} == kept
    total = json.loads((output / "summary.json").read_text())["total"]
    assert total["images"] == len(images)
    assert total["annotated"] == len(annotated)
    assert total["regions"] == sum(len(line["regions"]) for line in lines)
    failures = sum(count for name, count in total.items() if name.startswith("fault: "))
    assert failures == total["faulty"] == len(expected)
    results = [total[name] for name in ("caption", "describe", "ground") if name in total]
    assert results[-1] == len(annotated) - len(kept)  # of the last pass


def _encode(picture: PIL.Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()
