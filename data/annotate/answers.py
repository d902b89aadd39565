"""Parses answers of the chat model: text in another form than the prompt asks for is refused with a cause.

Bullets, numbers, quotes and headings are taken off a good answer. Refusals, rambling and repetitions are
kept out of the training texts, and counted.
"""

import re
from typing import NamedTuple

MAX_DESCRIPTIONS = 10  # per image, as in the paper
MAX_SUBJECT_WORDS = 12
MAX_CAPTION_WORDS = 60
MAX_DESCRIPTION_WORDS = 15
MAX_WORD_LENGTH = 10  # characters on average

EMPTY, REFUSAL, RUN_ON, REPEATED = "empty answer", "refusal", "run-on", "repeated line"
CUT_OFF, NO_SUBJECT, NO_CAPTION, NO_WORDS = "cut off", "no subject", "no caption", "no words"

# What stands before a line: bullets, quotation marks, Markdown; a number or a letter with its mark.
_BULLET = re.compile(r"^(?:[\s>*•·▪◦‣●○■□–—\-+#_\"'“”‘’`]|[(\[]?\d{1,2}[.):\]](?!\d)|\(?[a-zA-Z][.)]\s)+")
_TAIL = re.compile(r"[\s.,;:!*_\"'“”‘’`]+$")
_BROKEN = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufffd\ud800-\udfff]")
_MARKDOWN = re.compile(r"\*\*|__|`")
_KEY = re.compile(r"^(subject|caption)\s*:\s*", re.IGNORECASE)
_REFUSAL = re.compile(
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|^(?:(?:i am|i'm|we are|we're) (?:\w+ )?(?:sorry|unable|not able|afraid)\b"
    r"|(?:sorry|apologies|unfortunately)\b|i apologi[sz]e\b"
    r"|unable to (?:see|view|provide|assist|determine)\b"
    r"|(?:i|we) (?:cannot|can't|can not|could not|couldn't|do not|don't|won't|will not)\b"
    r"|(?:there (?:is|are|was|were) )?no (?:image|picture|photo(?:graph)?)s?"
    r" (?:was|were|is|are|has been|have been|provided|attached|visible)\b)",
    re.IGNORECASE,
)


class Refused(NamedTuple):
    """An answer, or a line of one, that is not used."""

    cause: str  # one of the names above; a counter's name
    detail: str  # what was got, cut to what fits on a line


def parse_caption(text: str, *, cut_off: bool = False) -> dict[str, str] | Refused:
    """The texts of "subject" and "caption" in an answer of two lines, `Subject: ...` and `Caption: ...`.

    `cut_off` says whether the limit of tokens ended it.
    """
    if refused := _refused(text, cut_off):
        return refused
    texts: dict[str, str] = {}
    for line in text.splitlines():
        line = _clean(line, tail=False)
        key = _KEY.match(line)
        if key:
            name = key.group(1).lower()
            if name in texts:
                return Refused(REPEATED, _show(line))
            texts[name] = _clean(line[key.end() :], tail=name == "subject")
        elif line:
            return Refused(RUN_ON, _show(line))  # more than was asked for: a model that rambles
    for name, cause, limit in (
        ("subject", NO_SUBJECT, MAX_SUBJECT_WORDS),
        ("caption", NO_CAPTION, MAX_CAPTION_WORDS),
    ):
        value = texts.get(name, "")
        if not _has_words(value):
            return Refused(cause, _show(text))
        if _too_long(value, limit):
            return Refused(RUN_ON, f"{name} of more than {limit} words: {_show(value)}")
    return texts


def parse_descriptions(text: str, *, cut_off: bool = False) -> list[str] | Refused:
    """At most MAX_DESCRIPTIONS descriptions of an answer with one per line, no two the same but for case.

    If the limit of tokens ended it (`cut_off`), the last line is left out. The answer is refused if the model
    declined, or if no line is left (with the cause of the first dropped one).
    """
    lines = text.splitlines()
    if refused := _refused(text, cut_off and len(lines) < 2):
        return refused
    dropped = [Refused(CUT_OFF, _show(lines.pop()))] if cut_off else []
    kept: dict[str, str] = {}
    for line in lines:
        if not line.strip() or line.rstrip().endswith(":"):  # "Here are the features:"
            continue
        description = _clean(line)
        if not _has_words(description):
            dropped.append(Refused(NO_WORDS, _show(line)))
        elif _too_long(description, MAX_DESCRIPTION_WORDS):
            dropped.append(Refused(RUN_ON, _show(line)))
        elif description.lower() in kept:
            dropped.append(Refused(REPEATED, _show(line)))
        elif len(kept) < MAX_DESCRIPTIONS:
            kept[description.lower()] = description
    if kept:
        return list(kept.values())
    return dropped[0] if dropped else Refused(EMPTY, _show(text))


def is_refusal(line: str) -> bool:
    """Whether a model declines in this line, instead of describing an image."""
    return bool(_REFUSAL.search(line.replace("’", "'")))


def _refused(text: str, cut_off: bool) -> Refused | None:
    """The reason to refuse a whole answer, if there is one."""
    if not text.strip():
        return Refused(EMPTY, _show(text))
    if cut_off:
        return Refused(CUT_OFF, _show(text))
    if any(is_refusal(_KEY.sub("", _clean(line))) for line in text.splitlines()):
        return Refused(REFUSAL, _show(text))
    return None


def _too_long(text: str, limit: int) -> bool:
    return len(text.split()) > limit or len(text) > limit * MAX_WORD_LENGTH


def _clean(line: str, *, tail: bool = True) -> str:
    line = _BULLET.sub("", _MARKDOWN.sub("", line))
    return " ".join((_TAIL.sub("", line) if tail else line.strip(" \t\"'“”‘’`")).split())


def _has_words(text: str) -> bool:
    """Whether there is a letter, and none of the characters that broken decodings leave."""
    return any(char.isalpha() for char in text) and not _BROKEN.search(text)


def _show(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 120 else text[:117] + "...")
