"""A page in Debian's Chromium, driven by playwright, and what goes wrong in it."""

import contextlib
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CHROMIUM = "/usr/bin/chromium"
_LOCAL = ("file", "data", "blob", "about")


@dataclass
class Opened:
    """A page (playwright's, sync) and what it has said since it was opened."""

    page: Any
    console: list[str] = field(default_factory=list)  # errors and warnings
    errors: list[str] = field(default_factory=list)  # exceptions that nothing caught
    elsewhere: list[str] = field(default_factory=list)  # requests that leave this machine, all refused

    def complaints(self) -> list[str]:
        """All of it; an empty list is a page in order."""
        return self.console + self.errors + self.elsewhere

    def broken_pictures(self) -> list[str]:
        """The starts of the addresses of images that did not load."""
        return self.page.eval_on_selector_all(
            "img", "all => all.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 80))"
        )


@contextlib.contextmanager
def opened(url: str, *, width: int = 1280, dark: bool = False) -> Iterator[Opened]:
    """The page at http://127.0.0.1:PORT/... in a fresh browser, loaded.

    Args:
      url: whose own host is no elsewhere.
      width: of the window, in pixels.
      dark: whether the reader prefers dark colours.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            colours = "dark" if dark else "light"
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colours)
            page.set_default_timeout(60_000)
            found = Opened(page)

            def note(message):
                if message.type in ("error", "warning"):
                    found.console.append(message.text)

            def answer(route):
                address = urllib.parse.urlsplit(route.request.url)
                if address.scheme in _LOCAL or address.hostname == urllib.parse.urlsplit(url).hostname:
                    return route.continue_()
                found.elsewhere.append(route.request.url)
                route.abort()

            page.on("console", note)
            page.on("pageerror", lambda error: found.errors.append(str(error)))
            page.route("**/*", answer)
            page.goto(url)
            yield found
        finally:
            browser.close()
