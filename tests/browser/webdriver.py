"""Headless Chromium through ChromeDriver, by the WebDriver protocol: no package is needed but Debian's two."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
]
_SECONDS = 120
REMEDY = "Chromium is not here: apt-get install chromium chromium-driver, then run this again"


class Browser:
    """One page."""

    def __init__(self, session: str) -> None:
        """``session`` is the URL of a WebDriver session."""
        self._session = session

    def open(self, url: str) -> None:
        """Load a page."""
        _call(f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What the body of a function returns in the page."""
        return _call(f"{self._session}/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **params: Any) -> Any:
        """A command of Chromium's own protocol."""
        return _call(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": params})

    def screen(self, width: int, *, dark: bool) -> None:
        """The page's width in CSS pixels, and the colours that its reader prefers."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1 if width > 700 else 2, "mobile": width < 700}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG file."""
        made = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(made["data"]))

    def messages(self) -> list[str]:
        """What the console says since it was asked last: errors and warnings, refused requests and policies too."""
        found = _call(f"{self._session}/se/log", {"type": "browser"})
        return [f"{each['level']}: {each['message']}" for each in found if each["level"] in ("SEVERE", "WARNING")]


def installed() -> tuple[str, str]:
    """Paths of ChromeDriver and Chromium.

    Raises:
        SystemExit: they are not here.

    """
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or program is None:
        raise SystemExit(REMEDY)
    return driver, program


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, with an empty profile."""
    driver, program = installed()
    command = [driver, "--port=0"]
    with (
        tempfile.TemporaryDirectory() as profile,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            port = next(found[1] for line in process.stdout or () if (found := re.search(r"on port (\d+)\.", line)))
            options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": program}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            url = f"http://127.0.0.1:{port}/session"
            made = _call(url, {"capabilities": {"alwaysMatch": wanted}})
            try:
                yield Browser(f"{url}/{made['sessionId']}")
            finally:
                _call(f"{url}/{made['sessionId']}", None, "DELETE")
        finally:
            process.terminate()


def _call(url: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310  # loopback
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310  # the same
        return json.load(answer)["value"]
