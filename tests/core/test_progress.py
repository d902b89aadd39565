"""The lines on stderr while something takes long."""

import sys
import threading

from grain_jax.core import progress


class Lines:
    """A stderr that says when it has so many lines."""

    def __init__(self, wanted: int):
        self.text, self._wanted, self.complete = "", wanted, threading.Event()

    def write(self, text: str) -> None:
        self.text += text
        if self.text.count("\n") >= self._wanted:
            self.complete.set()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def test_long_compiling_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr(progress, "COMPILING_SECONDS", 0.0)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.01)
    lines = Lines(3)
    monkeypatch.setattr(sys, "stderr", lines)
    with progress.while_compiling("the image encoder", "usually up to 2 minutes"):
        assert lines.complete.wait(60)
    text = lines.text
    first, second, *_ = text.splitlines()
    assert first == "compiling the image encoder, usually up to 2 minutes"
    assert second == "still compiling the image encoder: 0s so far"
    assert lines.text == text  # nothing comes after the end
