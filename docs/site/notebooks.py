"""A page of a notebook: its text, its code, and what it put out."""

import json
from collections.abc import Iterator
from typing import Any


def markdown(notebook: str) -> str:
    """The text of an .ipynb as Markdown; images lie in the page."""
    return "\n\n".join(
        part for cell in json.loads(notebook)["cells"] for part in _parts(cell) if part
    )


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        yield source
    if cell["cell_type"] != "code":
        return
    yield _fence("python", source)
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            png = "".join(data["image/png"]).replace("\n", "")
            yield f"![What the cell above draws](data:image/png;base64,{png})"
        else:
            yield _fence("text", "".join(output.get("text", data.get("text/plain", ""))).rstrip())


def _fence(language: str, text: str) -> str:
    return f"````{language}\n{text}\n````" if text else ""
