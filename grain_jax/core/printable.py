"""Texts of users made safe to print: control and invisible characters become escapes."""

import unicodedata

# Control characters, format marks (which turn or hide neighbouring text), halves of surrogate pairs, code
# points for private use or without a meaning, separators of lines and paragraphs.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# These two join emoji and letters of South Asian scripts.
_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


def plain(text: str, limit: int | None = None, *, keep: str = "") -> str:
    """`text` with escapes (`\\x1b`) for invisible characters, cut to `limit` characters.

    Args:
      text: any.
      limit: characters at most, "..." included.
      keep: characters that stay, such as the end of a line.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    keep += _JOINERS
    return "".join(
        x.encode("unicode_escape").decode() if x not in keep and unicodedata.category(x) in _HIDDEN else x
        for x in text
    )
