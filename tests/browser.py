"""A page in Debian's Chromium, driven by playwright, and what goes wrong in it: errors, requests to elsewhere."""

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
def opened(
    url: str, *, width: int = 1280, height: int = 900, dark: bool = False, timeout_s: float = 60
) -> Iterator[Opened]:
    """The page at `url` in a fresh browser, loaded.

    Args:
      url: `file:///...`, or `http://127.0.0.1:PORT/...`, whose own host is no elsewhere.
      width: of the window, in pixels; and `height`.
      dark: whether the reader prefers dark colours.
      timeout_s: for loading, and for whatever is waited for later.
    """
    from playwright.sync_api import sync_playwright

    own = urllib.parse.urlsplit(url).hostname

    def foreign(address: str) -> bool:
        parts = urllib.parse.urlsplit(address)
        return parts.scheme not in _LOCAL and parts.hostname != own

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            page.set_default_timeout(1000 * timeout_s)
            found = Opened(page)
            page.on(
                "console", lambda m: found.console.append(m.text) if m.type in ("error", "warning") else None
            )
            page.on("pageerror", lambda error: found.errors.append(str(error)))

            def answer(route):
                if foreign(route.request.url):
                    found.elsewhere.append(route.request.url)
                    route.abort()
                else:
                    route.continue_()

            page.route("**/*", answer)
            page.goto(url)
            yield found
        finally:
            browser.close()
