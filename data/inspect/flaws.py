"""What may be wrong with a text of the annotations, told from the text alone."""

import re

ROW_LENGTH = 77  # tokens, CLIP's: what training cuts texts to
LONG_DESCRIPTION = 24  # tokens; descriptions have 4 to 12

_REFUSAL = re.compile(
    r"\bi(?:'| a)m sorry\b|\bi apologi[sz]e\b|\bas an ai\b|\b(?:ai|language) (?:assistant|model)\b"
    r"|\bi (?:cannot|can't|can not|am unable to|am not able to)\b|\bi'm (?:unable|not able) to\b"
    r"|\bunable to (?:see|view|provide|assist|determine)\b|\bno (?:image|picture) (?:was )?provided\b"
)
_LEFTOVER = re.compile(
    r"[-*\u2022\u00b7#>]\s|\(?\d{1,2}[.):]\s|\*\*|(?:sure|certainly|of course)[,!]|here (?:are|is) "
    r"|(?:caption|description|subject|answer)s?\s*:"
)


def of_text(kind: str, plain: str, tokens: int) -> list[str]:
    """Names of the flaws: "refusal in" or "markup in", "cut" or "long".

    Args:
      kind: "web", "synthetic" or "description". People may be sorry; a model should not be.
      plain: the text, cleaned and in lower case.
      tokens: its length with start and end token.
    """
    found = []
    if kind != "web":
        if _REFUSAL.search(plain):
            found.append("refusal in")
        elif _LEFTOVER.match(plain):
            found.append("markup in")
    if tokens > ROW_LENGTH:
        found.append("cut")
    elif kind == "description" and tokens > LONG_DESCRIPTION:
        found.append("long")
    return found
