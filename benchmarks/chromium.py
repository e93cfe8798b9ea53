"""Headless Chromium by its own debugging protocol over a pipe: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import time
from typing import Any

FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)


class Page:
    """One page of a browser that ends with it. What a page logs as an error is in ``problems``."""

    def __init__(self, executable: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="memopt-chromium-")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4.
        both = f'exec {{a}}<&{theirs_in} {{b}}>&{theirs_out}; exec 3<&$a 4>&$b; exec "$0" "$@"'
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        argv = [executable, *FLAGS, *root, f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", both, *argv], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self._asked, self._unread = 0, b""
        self._events: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._session = ""
        self.version = self._call("Browser.getVersion")["product"]
        (target,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self._session = ""
        self._call("Browser.close")
        self._process.wait(20)
        self._in.close()
        self._out.close()
        self._folder.cleanup()

    def _call(self, method: str, **params: Any) -> Any:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._asked:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            more = os.read(self._in.fileno(), 2**20)
            if not more:
                raise RuntimeError("the browser has gone away")
            self._unread += more
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._note(message["method"], message["params"])
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def screen(self, width: int, height: int, scheme: str) -> None:
        """Pixels of the window, and whether the person wants ``light`` or ``dark``."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'", 60)

    def before_scripts(self, source: str) -> None:
        """Run this before those of every page that is opened from now on."""
        self._call("Page.addScriptToEvaluateOnNewDocument", source=source)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited. Raises RuntimeError for an exception of the page's."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"].get("exception", {}).get("description")))
        return found["result"].get("value")

    def until(self, expression: str, seconds: float) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.evaluate(expression):
                return value
            time.sleep(0.02)
        raise RuntimeError(f"after {seconds} s still not: {expression}; the page said {self.problems}")

    def press(self, key: str, code: str, number: int, modifiers: int = 0) -> None:
        """A key of the keyboard, down and up. ``number`` is its Windows key code, ``modifiers`` 8 for Shift."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self._call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def accessible(self) -> list[dict[str, Any]]:
        """The page's tree as assistive technology is told it."""
        nodes: list[dict[str, Any]] = self._call("Accessibility.getFullAXTree")["nodes"]
        return nodes

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(found["data"])
