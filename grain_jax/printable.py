"""Texts of users as people may see them: a description is data, whatever characters it has."""

import unicodedata

# Control characters, which move a terminal; marks that turn or hide what stands beside them; halves of
# characters; separators of lines and paragraphs; code points without a meaning.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Emoji and the scripts of South Asia are joined by these two.
_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


def plain(text: str, limit: int | None = None, *, keep: str = "") -> str:
    """`text` with what cannot be seen as escapes (`\\x1b`), cut to `limit` characters.

    Args:
      text: any.
      limit: characters at most, "..." among them.
      keep: characters that stay, such as the end of a line.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    keep += _JOINERS
    return "".join(
        x.encode("unicode_escape").decode()
        if x not in keep and unicodedata.category(x) in _HIDDEN
        else x
        for x in text
    )
