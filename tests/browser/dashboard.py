"""The dashboard in headless Chromium, before a server of a tiny model whose conversations are being compacted.

    make browser

Asserts that the page loads nothing from elsewhere and writes nothing on the console, that it asks for a key, keeps it
in the tab, shows no other key's conversations, and that every chart has points; writes pictures at 1,280 and 390
pixels, light and dark, to build/browser.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

from agentmem.serving.app import create_app
from browser.webdriver import Browser, browser, installed
from support import serving
from support.waiting import join, wait_until

FOLDER = Path("build/browser")
CHARTS = ("bytes", "rate", "queue", "errors", "seconds")
CONVERSATIONS = 6
ALICE, BOB = serving.KEYS


def talk(url: str, key: str, name: str, stop: threading.Event) -> None:
    """Say something again and again, until the end."""
    headers, told = {"X-Agentmem-Session": name}, serving.said(f"I am {name}.")
    with OpenAI(base_url=url, api_key=key, max_retries=5) as client:
        while not stop.is_set():
            fields = {"max_tokens": 60, "temperature": 1.0, "extra_headers": headers}
            made = client.chat.completions.create(model=serving.MODEL, messages=told, **fields)  # type: ignore[call-overload]
            told += [made.choices[0].message.model_dump(exclude_none=True), *serving.said("Go on, and say more of it.")]
            stop.wait(0.2 + 0.1 * len(name))


@contextmanager
def load(url: str) -> Iterator[None]:
    """Conversations of two keys that go on while the block runs."""
    stop = threading.Event()
    given = [(ALICE, f"agent-{at}") for at in range(CONVERSATIONS)] + [(BOB, "the-other-key")]
    threads = [threading.Thread(target=talk, args=(url, key, name, stop)) for key, name in given]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        stop.set()
        join(*threads)


def points(page: Browser) -> dict[str, int]:
    """Points of each chart."""
    script = (
        "return [...document.querySelectorAll('.chart')].map((box) => [box.id || box.parentElement.dataset.id,"
        " [...box.querySelectorAll('[data-points]')].reduce((sum, each) => sum + Number(each.dataset.points), 0)])"
    )
    return dict(page.run(script))


def enter(page: Browser, key: str) -> None:
    """Give the page a key, as its reader would."""
    page.run(f"document.getElementById('key').value = '{key}'; document.getElementById('ask').requestSubmit()")


def check_key(page: Browser, origin: str) -> None:
    """Without a key nothing is shown; with a wrong one it says so; the right one is kept in the tab alone."""
    page.open(origin)
    wait_until(lambda: page.run("return !document.getElementById('ask').hidden"))
    assert page.run("return document.getElementById('main').hidden")
    assert page.messages() == []
    enter(page, "wrong-key-1")
    wait_until(lambda: page.run("return !document.getElementById('wrong').hidden"))
    assert all("401" in each for each in page.messages())  # Chromium's own note of that status
    enter(page, ALICE)
    wait_until(lambda: page.run("return document.getElementById('link').dataset.state === 'live'"))
    assert page.run("return [localStorage.length, document.cookie, location.href]") == [0, "", origin]


def check_page(page: Browser, origin: str) -> None:
    """What it shows, and what it loaded."""
    wait_until(lambda: all(points(page).get(name, 0) > 1 for name in CHARTS))
    wait_until(lambda: sum(count > 8 for name, count in points(page).items() if name not in CHARTS) == CONVERSATIONS)
    text = page.run("return document.body.innerText")
    assert "agent-0" in text
    assert "the-other-key" not in text
    loaded = page.run("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert loaded
    assert all(each.startswith(origin) for each in loaded), loaded


def pictures(page: Browser) -> None:
    """At two widths in both colours; nothing is wider than the screen."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for width in (1280, 390):
        for dark in (False, True):
            page.screen(width, dark=dark)
            time.sleep(2.5)  # the page draws anew each second
            assert page.run("return document.documentElement.scrollWidth") <= width
            page.picture(path := FOLDER / f"dashboard-{width}-{'dark' if dark else 'light'}.png")
            print(path)  # noqa: T201  # for a person


def main() -> None:
    """Serve, talk, look."""
    installed()
    of = serving.server(
        serving.runtime(3, slots=128, policy="am-halving", pressure=("trim", "disk")),
        keys=serving.KEYS,
        max_requests=64,
    )
    with browser() as page, serving.listening(create_app(of), of) as url, load(url):
        origin = url.removesuffix("v1")
        page.screen(1280, dark=False)
        check_key(page, origin)
        check_page(page, origin)
        pictures(page)
        assert page.messages() == []
    print("no console messages; all charts have points")  # noqa: T201  # for a person


if __name__ == "__main__":
    main()
