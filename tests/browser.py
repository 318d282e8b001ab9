"""A real Chromium for tests of pages, driven over WebDriver's HTTP interface without a package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MUST_RUN = "VASTSCALE_TEST_BROWSER" in os.environ  # a missing browser is an error, not a skip
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
ELEMENT = (
    "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's own name for a reference to an element
)


class Browser:
    """A session of Chromium."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        binary = next(
            filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        )
        options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})[
            "sessionId"
        ]

    def open(self, page: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a file in a window whose viewport has this size."""
        self._command(
            "goog/cdp/execute",
            cmd="Emulation.setDeviceMetricsOverride",
            params={"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self._command(
            "goog/cdp/execute",
            cmd="Emulation.setEmulatedMedia",
            params={
                "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            },
        )
        self._command("url", url=page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the result of a script."""
        return self._command("execute/sync", script=script, args=list(arguments))

    def drag(self, selector: str, start: float, end: float, pointer: str = "mouse") -> None:
        """Press the mouse (or a finger: "touch") in an element at the fraction `start` of its
        width, and release it at `end`."""
        found = self._command("element", using="css selector", value=selector)
        width = self.run(
            "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'}); "
            "return arguments[0].getBoundingClientRect().width",
            found,
        )

        def move(share: float) -> dict[str, Any]:
            return {
                "type": "pointerMove",
                "duration": 50,
                "origin": found,
                "x": round((share - 0.5) * width),
                "y": 0,
            }

        actions = [
            move(start),
            {"type": "pointerDown", "button": 0},
            move(end),
            {"type": "pointerUp", "button": 0},
        ]
        self._command(
            "actions",
            actions=[
                {
                    "type": "pointer",
                    "id": pointer,
                    "actions": actions,
                    "parameters": {"pointerType": pointer},
                }
            ],
        )

    def press(self, selector: str, keys: str) -> None:
        """Type into an element."""
        found = self._command("element", using="css selector", value=selector)
        self._command(f"element/{found[ELEMENT]}/value", text=keys)

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """Take a picture of the window, or of the whole page."""
        shot = self._command(
            "goog/cdp/execute",
            cmd="Page.captureScreenshot",
            params={"format": "png", "captureBeyondViewport": whole},
        )
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def console(self) -> list[str]:
        """Return the page's messages and errors since the last call."""
        return [entry["message"] for entry in self._command("se/log", type="browser")]

    def close(self) -> None:
        """End the session and the browser."""
        self._ask("DELETE", f"/session/{self._session}")

    def _command(self, name: str, **body: Any) -> Any:
        return self._ask("POST", f"/session/{self._session}/{name}", body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self._address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()[:2000]}") from error


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a browser with a profile in `folder`; skip the test if there is none, unless it must
    run."""
    if shutil.which("chromedriver") is None or not any(
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    ):
        (pytest.fail if MUST_RUN else pytest.skip)(
            "no chromium and chromedriver here (Debian: chromium, chromium-driver)"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as driver:
        try:
            _wait_for(port)
            session = Browser(f"http://127.0.0.1:{port}", folder / "profile")
            try:
                yield session
            finally:
                session.close()
        finally:
            driver.terminate()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.05)
