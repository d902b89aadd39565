"""Finds flaws of a caption or description: refusals, markup, excessive length."""

import re

from grain_jax.data.annotate import answers

ROW_LENGTH = 77  # tokens of a row in CLIP; training cuts longer texts
LONG_DESCRIPTION = 24  # tokens; descriptions have 4 to 12

_LEFTOVER = re.compile(
    r"[-*\u2022\u00b7#>]\s|\(?\d{1,2}[.):]\s|\*\*|(?:sure|certainly|of course)[,!]|here (?:are|is) "
    r"|(?:caption|description|subject|answer)s?\s*:"
)


def of_text(kind: str, plain: str, tokens: int) -> list[str]:
    """The names of the flaws: "refusal in" or "markup in", "cut" or "long".

    Args:
      kind: "web", "synthetic" or "description"; web texts are not checked for refusals and markup of a model.
      plain: the text, cleaned and in lower case.
      tokens: its length with start and end token.
    """
    found = []
    if kind != "web":
        if answers.is_refusal(plain):
            found.append("refusal in")
        elif _LEFTOVER.match(plain):
            found.append("markup in")
    if tokens > ROW_LENGTH:
        found.append("cut")
    elif kind == "description" and tokens > LONG_DESCRIPTION:
        found.append("long")
    return found
