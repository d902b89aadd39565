"""Photographs and drawings of nameable things out of GCompris, to test names on pictures of another kind.

`write` makes

  DIR/animals, things, monuments, drawings   class folders for `grain-jax evaluate zeroshot --images DIR/animals`;
                                             the first three are photographs; drawings are laid on a white ground
  DIR/A.jsonl                                a picture and a caption for every name, for `evaluate retrieval --images DIR`
  DIR/licences.tsv, copyright                who made each picture, its licence and source, as the package lists them
  DIR/README.md                              written last

Names are the file names of the package, in words; a table corrects those that no reader would say.
"""

import fnmatch
import io
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import PIL.Image
from etils import epath

from benchmarks.fetch import package, qt
from grain_jax.core import images, regular_file
from grain_jax.data.aviary.generate import write_lines

PACKAGE = "gcompris-qt-data"
_RESOURCES = "usr/share/gcompris-qt/rcc"
_COPYRIGHT = f"usr/share/doc/{PACKAGE}/copyright"
_MOST = 2**28  # bytes of the pictures
_MOST_COPYRIGHT = 2**20
# Set -> folders below src/activities; the first word names the resource.
FOLDERS = {
    group: tuple(folders.split())
    for group, folders in dict(
        animals="erase/resource explore_farm_animals/resource/animals"
        " explore_world_animals/resource/animals",
        things="categorization/resource/images/fishes categorization/resource/images/others"
        " categorization/resource/images/renewable categorization/resource/images/tools",
        monuments="categorization/resource/images/monuments explore_monuments/resource/egypt"
        " explore_monuments/resource/france explore_monuments/resource/germany"
        " explore_monuments/resource/india explore_monuments/resource/usa"
        " explore_monuments/resource/wonders",
        drawings="lang/resource/words_sample",
    ).items()
}
_WORDS = "lang/resource/words_sample.json"
# Of the drawings; the other lessons are colours, numbers, people and parts of the body.
_LESSONS = ("animal", "fruit")
# Stem of a file name -> the name; none: no single thing is to be seen, or another name fits as well.
_TABLE = pathlib.Path(__file__).with_name("names.tsv").read_text()
_NAMES = dict(line.split("\t") for line in _TABLE.splitlines())
_DRAWN = {"animal": "", "bug": "", "flies": "fly", "fruit": "", "reptile": ""}


class _Word(msgspec.Struct):
    image: str  # file name
    description: str


class _Lesson(msgspec.Struct):
    name: str
    content: msgspec.Raw  # words, in the lessons that are read


class _Chapter(msgspec.Struct):
    content: list[_Lesson]


class Picture(NamedTuple):
    """A picture of the package."""

    group: str  # "animals", ...
    name: str
    path: str  # in the sources of GCompris
    content: bytes


def name_of(stem: str) -> str:
    """The name of the thing that a file shows; "" where it is left out.

    Capitals and underscores part words; a number at the end tells pictures of one thing apart.
    """
    for known in (stem, re.sub(r"\d+\Z", "", stem)):
        if known in _NAMES:
            return _NAMES[known]
    words = re.sub(r"\d+\Z", "", stem).replace("_", " ")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).lower()


def write(output: epath.PathLike, *, deb: str | None = None) -> str:
    """Writes the folder `output`.

    Args:
      deb: file of the package; None: apt-get downloads it.

    Returns: what was done, in words.

    Raises:
      package.PackageError: no package, or another one; `output` is not empty.
    """
    output = epath.Path(output)
    if (output / "README.md").exists():
        return "already complete"
    if output.exists() and any(output.iterdir()):
        raise package.PackageError(
            f"{output}: is not empty and has no README.md; remove it or choose another --output"
        )
    needed = {folder.partition("/")[0] for folders in FOLDERS.values() for folder in folders}
    paths = {f"{_RESOURCES}/{name}.rcc": "pictures" for name in sorted(needed)}
    found = package.read(PACKAGE, deb, {**paths, _COPYRIGHT: "licences"})
    if len(found[_COPYRIGHT]) > _MOST_COPYRIGHT:
        raise package.PackageError(f"{_COPYRIGHT}: got over {_MOST_COPYRIGHT:,} bytes")
    copyright_text = found[_COPYRIGHT].decode("utf-8", "replace")
    known = licences(copyright_text)
    counts = dict.fromkeys(FOLDERS, 0)
    captions, table = {}, ["file\tname\tlicence\tholders\tsource\tlisted as"]
    for picture in _pictures(found, list(paths)):
        activity, _, file = picture.path.removeprefix("src/activities/").partition("/")
        stem, _, ending = file.rpartition("/")[2].rpartition(".")
        ending = "png" if picture.group == "drawings" else ending
        target = f"{picture.group}/{_safe(picture.name)}/{activity}-{_safe(stem)}.{ending}"
        path = regular_file.below(output, target, PACKAGE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_on_white(picture) if ending == "png" else picture.content)
        counts[picture.group] += 1
        kind = "drawing" if picture.group == "drawings" else "photo"
        captions.setdefault(f"a {kind} of {picture.name}", target)
        row = [target, picture.name, *_listed(licence_of(picture.path, known))]
        table.append("\t".join(" ".join(column.split()) for column in row))
    lines = [{"image": path, "caption": said} for said, path in captions.items()]
    write_lines(output / "A.jsonl", lines)
    (output / "licences.tsv").write_text("\n".join(table) + "\n")
    (output / "copyright").write_text(copyright_text)
    (output / "README.md").write_text(_readme(counts, len(captions)))
    return ", ".join(f"{count} {group}" for group, count in counts.items())


def _safe(name):
    """A name of the package as a name of a file or folder: letters, digits, - and _, at most 60."""
    return re.sub(r"[^\w-]", "_", name)[:60]


def _on_white(picture):
    """A PNG: where the drawing is transparent, readers of RGB would see what colours hide there."""
    try:
        drawing = images.decode_image(picture.content, picture.path).convert("RGBA")
    except images.ImageError as error:
        raise package.PackageError(str(error)) from None
    ground = PIL.Image.new("RGBA", drawing.size, "white")
    out = io.BytesIO()
    PIL.Image.alpha_composite(ground, drawing).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _listed(licence):
    """The columns about a licence."""
    if licence is None:
        return "", "", "", ""
    return licence if licence.pattern != "*" else licence._replace(holders="see copyright")


class Licence(NamedTuple):
    """What a paragraph of the copyright file says of a file."""

    name: str
    holders: str
    source: str  # the comment of the paragraph, most often an address
    pattern: str  # of the paragraph; "*": it is about every file that no other names


def licences(text: str) -> list[Licence]:
    """The patterns of a machine-readable copyright file (DEP-5, format 1.0), in their order."""
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, list[str]] = {}
        name = ""
        for line in paragraph.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name].append(line.strip())
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = [value.strip()] if value.strip() else []
        holders, source = ("; ".join(fields.get(key, [])) for key in ("Copyright", "Comment"))
        licence = fields.get("License", [""])[0]
        for pattern in " ".join(fields.get("Files", [])).split():
            found.append(Licence(licence, holders, source, pattern))
    return found


def licence_of(path: str, known: list[Licence]) -> Licence | None:
    """The last that matches a file; endings are not compared, since packages store pictures in other formats."""
    stem = lambda path: re.sub(r"\.\w+\Z", "", path)
    matching = (x for x in reversed(known) if fnmatch.fnmatchcase(stem(path), stem(x.pattern)))
    return next(matching, None)


def _pictures(found, paths) -> Iterator[Picture]:
    files, left = {}, _MOST
    for path in paths:
        try:
            for name, data in qt.files(found[path], left):
                left -= len(data)
                files[re.sub(r"\A.*?(?=src/activities/)", "", name)] = data
        except qt.ResourceError as error:
            raise package.PackageError(f"{path}: {error}; expected {PACKAGE}") from None
    drawn = _drawn(files)
    for group, folders in FOLDERS.items():
        some = False
        for folder, path in itertools.product(folders, sorted(files)):
            above, _, file = path.removeprefix("src/activities/").rpartition("/")
            stem, _, ending = file.rpartition(".")
            if above == folder and ending in ("webp", "png", "jpg"):
                name = drawn.get(file, "") if group == "drawings" else name_of(stem)
                if name:
                    some = True
                    yield Picture(group, name, path, files[path])
        if not some:
            raise package.PackageError(
                f"{PACKAGE}: has no pictures in {', '.join(folders)}; this version has other folders"
            )


def _drawn(files):
    """File -> name of the drawings, by the lessons of the activity."""
    where, expected = f"{PACKAGE}: {_WORDS}", "chapters of lessons of words"
    content = files.get(f"src/activities/{_WORDS}", b"")
    chapters = regular_file.from_json(content, list[_Chapter], where, expected)
    lessons = [x.content for one in chapters for x in one.content if x.name in _LESSONS]
    words = [regular_file.from_json(x, list[_Word], where, expected) for x in lessons]
    return {
        word.image: _DRAWN.get(word.description, word.description) for one in words for word in one
    }


def _readme(counts, captions):
    rows = "\n".join(f"| `{group}/` | {count} |" for group, count in counts.items())
    return f"""# Pictures of GCompris, to test on

Made by `python -m benchmarks.fetch gcompris` of Debian's package {PACKAGE}: a folder for each name. Licences differ from picture
to picture: `licences.tsv` lists them as the package does (`*` in the last column: no paragraph of `copyright` names
the picture, the licence is that of GCompris as a whole). Drawings were laid on a white ground and stored as PNG;
photographs are the files of the package.

| | pictures |
|---|---|
{rows}

`A.jsonl` has one picture of each name ({captions}), with a caption, for retrieval.
"""
