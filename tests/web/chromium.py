"""A headless Chromium that a test drives: pages opened, looked at, clicked and printed, and all that they complain of.

It speaks the DevTools protocol over a pipe (`--remote-debugging-pipe`): JSON that NUL ends, to the browser's descriptor
3 and from its descriptor 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final, Self

import pytest

__all__ = ["Chromium", "Page", "chromium_or_skip", "running_chromium"]

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_WITHIN_S: Final = 60.0
"""A browser that says nothing for so long is stuck; a busy machine is not."""
SWITCHES: Final = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm may be tiny
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
)


def chromium_or_skip() -> str:
    """Return where Chromium is."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip("no Chromium here: apt-get install chromium")


class Chromium:
    """A running browser: its process group, and the messages to and from it."""

    def __init__(self, executable: str, profile: Path) -> None:
        """Start it with an empty profile."""
        switches = [*SWITCHES, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={profile}"]
        to_browser, self._output = os.pipe()
        self._input, from_browser = os.pipe()
        # The shell puts the pipes where the browser looks for them; this process has its own 3 and 4.
        program = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", program, executable, *switches, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": str(profile), "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
        )
        os.close(to_browser)
        os.close(from_browser)
        self._received = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    @property
    def group(self) -> int:
        """The process group of the browser and all its processes."""
        return self._process.pid

    def close(self) -> None:
        """End the browser and all its processes."""
        os.close(self._output)
        os.close(self._input)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Send a command and return its result; events meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        unsent = memoryview(json.dumps(message).encode() + b"\0")
        while unsent:
            unsent = unsent[os.write(self._output, unsent) :]
        while True:
            answer = self._receive()
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def wait_for(self, method: str, session: str) -> dict[str, Any]:
        """Return the first event of that name that was not asked for yet, and forget it."""
        seen = 0
        while True:
            for place in range(seen, len(self.events)):
                event = self.events[place]
                if event.get("method") == method and event.get("sessionId") == session:
                    del self.events[place]
                    return event
            seen = len(self.events)
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        """Return the next message from the browser."""
        give_up = monotonic() + ANSWER_WITHIN_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._input], [], [], max(give_up - monotonic(), 0))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {ANSWER_WITHIN_S:.0f} s")
            got = os.read(self._input, 1 << 20)
            if not got:
                raise RuntimeError(f"Chromium has ended, status {self._process.wait()}")
            self._received += got
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    @contextmanager
    def opened(self, file: Path, width: int = 1000, height: int = 900) -> Iterator[Page]:
        """Have a file open in a tab of its own, loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        try:
            yield page._load(file, width, height)
        finally:
            self.ask("Target.closeTarget", targetId=target)


class Page:
    """An open page.

    complaints: what the page wrote to the console, raised, or was refused by its own policy; requests: what it loaded.
    """

    def __init__(self, browser: Chromium, session: str) -> None:
        """Hold a tab that is attached to."""
        self._browser = browser
        self._session = session

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Send a command of this page."""
        return self._browser.ask(method, self._session, **parameters)

    def _load(self, file: Path, width: int, height: int) -> Self:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.resize(width, height)
        self.ask("Page.navigate", url=file.as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)
        return self

    def reload(self) -> None:
        """Load the file again."""
        self.ask("Page.reload")
        self._browser.wait_for("Page.loadEventFired", self._session)

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of so many pixels."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.settle()

    def settle(self) -> None:
        """Wait until what was done so far has been drawn, and the events that come of it have been handled."""
        frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        self.evaluate(frame)

    def touch(self) -> None:
        """Give the page a touch screen."""
        self.ask("Emulation.setTouchEmulationEnabled", enabled=True)

    def emulate(self, scheme: str = "light", media: str = "screen") -> None:
        """Show the page as on a light or dark screen, or in print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)

    def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - whatever the page says
        """Return the value of a JavaScript expression, a promise's too."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        self.settle()
        mine = [it for it in self._browser.events if it.get("sessionId") == self._session]
        return [it for it in mine if it.get("method") in methods]

    @property
    def complaints(self) -> list[str]:
        """What went wrong so far."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(it["params"])[:400] for it in self._events(*methods)]

    @property
    def requests(self) -> list[str]:
        """The addresses of all that was loaded, or tried to be."""
        found = self._events("Network.requestWillBeSent")
        return [it["params"]["request"]["url"] for it in found]

    @property
    def dialogs(self) -> int:
        """How often the page asked for attention, as by alert()."""
        return len(self._events("Page.javascriptDialogOpening"))

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:  # noqa: ANN401 - JSON
        """Do something with the mouse: kind is mouseMoved, mousePressed, mouseReleased or mouseWheel."""
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float, count: int = 1) -> None:
        """Click, or double-click."""
        for number in range(1, count + 1):
            self.mouse("mousePressed", x, y, button="left", clickCount=number)
            self.mouse("mouseReleased", x, y, button="left", clickCount=number)

    def drag(self, begin: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one place, release at another."""
        self.mouse("mouseMoved", *begin)
        self.mouse("mousePressed", *begin, button="left", clickCount=1)
        middle = (begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2
        self.mouse("mouseMoved", *middle, button="left")
        self.mouse("mouseMoved", *end, button="left")
        self.mouse("mouseReleased", *end, button="left", clickCount=1)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key by its name in JavaScript."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **(text if kind == "keyDown" else {})
            )

    def tap(self, x: float, y: float) -> None:
        """Touch a place."""
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, file: Path | None = None, *, whole: bool = True) -> bytes:
        """Return the page as a PNG, as long as it is or only what the window shows."""
        parameters: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
            parameters["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        png = base64.b64decode(self.ask("Page.captureScreenshot", **parameters)["data"])
        if file is not None:
            file.write_bytes(png)
        return png

    def pdf(self, file: Path | None = None) -> bytes:
        """Return the page as it is printed."""
        printed = base64.b64decode(self.ask("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"])
        if file is not None:
            file.write_bytes(printed)
        return printed


@contextmanager
def running_chromium() -> Iterator[Chromium]:
    """Have a browser run, with a profile that is deleted at the end; skip where there is none."""
    executable = chromium_or_skip()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        browser = Chromium(executable, Path(profile))
        try:
            yield browser
        finally:
            browser.close()
