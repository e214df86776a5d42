"""A headless Chromium, driven through chromedriver by the W3C's WebDriver protocol."""

import base64
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
CLEAR_FIELD = "\ue009a\ue000\ue003"  # Ctrl+A, then Backspace: a page's own handlers see it typed
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


class Browser:
    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http = http
        self._path = f"/session/{session}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        reply = self._http.request(method, self._path + path, json=body if method == "POST" else None).json()["value"]
        assert not (isinstance(reply, dict) and "error" in reply), reply
        return reply

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def script(self, source: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": source, "args": []})

    def find(self, css: str) -> str:
        return str(self.call("POST", "/element", {"using": "css selector", "value": css})[ELEMENT])

    def click(self, css: str) -> None:
        self.call("POST", f"/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str, *, instead: bool = False) -> None:
        self.call("POST", f"/element/{self.find(css)}/value", {"text": (CLEAR_FIELD if instead else "") + text})

    def value(self, css: str) -> str:
        return str(self.script(f"return document.querySelector({css!r})?.value ?? ''"))

    def texts(self, css: str) -> list[str]:
        return list(self.script(f"return [...document.querySelectorAll({css!r})].map(e => e.textContent.trim())"))

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} did not come to be within {seconds} s"
            time.sleep(0.05)
        return found

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def log(self) -> list[str]:
        """What the page's console says, of network errors too."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """The browser, with an empty profile; the test skips where Debian's packages are not installed."""
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or browser is None:
        pytest.skip("no Chromium here: `apt-get install chromium chromium-driver` gives this test its browser")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        port = next(line.rstrip(".\n").split()[-1] for line in lines if "started successfully on port" in line)
        options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,1060"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            reply = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in reply, reply
            opened = Browser(http, reply["sessionId"])
            try:
                yield opened
            finally:
                opened.call("DELETE", "")
    finally:
        process.terminate()
        process.communicate(timeout=20)
