"""The comments that explain the fields of a class, as a section of its text in the reference."""

import io
import pathlib
import tokenize

import griffe

NOTHING = "<!-- -->"  # Google's style wants words after a name


class FieldComments(griffe.Extension):
    """Griffe's extension: the docstring of a class gets a section with its fields and their comments."""

    def on_class_members(self, *, cls, **others):
        """Called for each class, with its members read."""
        fields = [
            member
            for member in cls.members.values()
            if member.is_attribute
            and member.annotation is not None
            and "property" not in member.labels
            and not member.name.startswith("_")
        ]
        if not fields or cls.docstring is None or "Attributes:" in cls.docstring.value:
            return
        source = pathlib.Path(cls.filepath).read_text()
        lines = [
            f"    {field.name}: {comment_at(source, field.lineno, field.endlineno) or NOTHING}"
            for field in fields
        ]
        cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def comment_at(source: str, first: int, last: int) -> str:
    """The comments above and beside the statement of these lines, in one line."""
    comments = {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    while comments.get(first - 1, ("", False))[1]:
        first -= 1
    return " ".join(comments[line][0] for line in range(first, last + 1) if line in comments)
