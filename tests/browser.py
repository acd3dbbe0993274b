"""Headless Chromium, driven over two pipes: what a page shows a person, looked at by tests and kept as pictures.

Chromium is no dependency: tests that need it are skipped, in words, where it is not installed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
# As root in a sandbox, without a network: no sandbox of its own, nothing fetched in the background.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


def find_browser() -> str | None:
    """Chromium's path; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium; a context.

    Args:
        width: Of the window, in CSS pixels.
        height: Of the window.
        mobile: Behave as a phone: the page is laid out at this width whatever it would like.

    Attributes:
        errors: What went wrong on the pages opened so far, as their console has it.
    """

    def __init__(self, width: int = 1400, height: int = 900, mobile: bool = False) -> None:
        self.errors: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="browser_")
        self._counter, self._rest = 0, b""
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = [str(find_browser()), *OPTIONS, f"--user-data-dir={self._folder.name}", "about:blank"]

        # Chromium reads from descriptor 3 and writes to 4; a shell puts ours there.
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *command],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self._call("Runtime.enable")
        self._call("Log.enable")
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if a person had the window before them
        self.resize(width, height, mobile)

    _session: str | None = None

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """Have the page laid out in a window of another size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address: str) -> None:
        """Load a page and wait until it is there."""
        self._call("Page.enable")
        self._call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", script))
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until an expression is true, and return its value; raises TimeoutError."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.evaluate(script):
                return found
            time.sleep(0.2)
        raise TimeoutError(f"{script} did not become true in {seconds:.0f} s")

    def lines(self) -> list[str]:
        """What the page says now, from top to bottom."""
        return self.evaluate(TEXT)

    def problems(self) -> list[str]:
        """What keeps some people from using the page: pictures without words, headings that skip, links to nowhere."""
        return self.evaluate(PROBLEMS)

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """Keep a PNG of the window, or of the whole page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        image = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(image))
        return path

    def close(self) -> None:
        """End the browser."""
        self._session = None
        try:
            self._call("Browser.close")
        except (OSError, EOFError):
            self._process.kill()
        self._process.wait(20)
        os.close(self._out)
        os.close(self._in)
        self._folder.cleanup()

    def _call(self, method: str, **params: Any) -> Any:
        self._counter += 1
        message: dict[str, Any] = {"id": self._counter, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._counter:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _note(self, event: dict[str, Any]) -> None:
        kind, what = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown" or (kind == "Runtime.consoleAPICalled" and what["type"] == "error"):
            self.errors.append(json.dumps(what.get("exceptionDetails", what))[:500])
        if kind == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(what["entry"]["text"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], 120)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 2**20)
            if not part:
                raise EOFError("the browser has ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


PROBLEMS = """
(function () {
  const found = [], all = (what) => [...document.querySelectorAll(what)];
  all('img:not([alt]), img[alt=""]').forEach(() => found.push('a picture without words'));
  all('th:not([scope])').forEach((cell) => found.push('a head of nothing: ' + cell.textContent));
  all('[id]').filter((one) => document.getElementById(one.id) !== one).forEach((one) => found.push('twice: ' + one.id));
  all('a[href^="#"]').filter((link) => !document.getElementById(link.hash.slice(1)))
    .forEach((link) => found.push('leads nowhere: ' + link.hash));
  const levels = all('h1, h2, h3, h4, h5, h6').map((heading) => Number(heading.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) found.push('not one first heading');
  levels.forEach((level, at) => { if (level > (levels[at - 1] || 0) + 1) found.push('a heading skips to ' + level); });
  return found;
})()
"""

# What a page says, a line an element, within web components too, of which TensorBoard is made.
TEXT = """
(function () {
  const lines = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) {
      if (node.data.trim()) lines.push(node.data.trim());
      return;
    }
    if (node.nodeType === Node.ELEMENT_NODE) {
      if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName)) return;
      if (node.checkVisibility && !node.checkVisibility() && getComputedStyle(node).display !== 'contents') return;
      if (node.tagName === 'SLOT' && node.assignedNodes().length) return node.assignedNodes().forEach(walk);
    }
    (node.shadowRoot || node).childNodes.forEach(walk);
  };
  walk(document.body);
  return lines;
})()
"""
