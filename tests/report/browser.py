"""Debian's Chromium without a window, spoken to over a pipe (its DevTools protocol)."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
WHY = "Chromium is not installed: apt-get install chromium"


class Browser:
    """One tab. Events that a page must not cause are kept in `complaints` and `requests`."""

    def __init__(self, folder):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        # The program reads from 3 and writes to 4, whatever the pipes' own numbers are.
        command = (
            f"exec {PROGRAM} --headless --no-sandbox --disable-gpu --disable-dev-shm-usage "
            f"--no-first-run --remote-debugging-pipe --user-data-dir={folder} about:blank "
            f"3<&{read} 4>&{write}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(read, write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self.number, self.buffer, self.session = 0, b"", None
        self.complaints, self.requests, self.loaded = [], [], 0
        tabs = self.call("Target.getTargets")["targetInfos"]
        (tab,) = [tab["targetId"] for tab in tabs if tab["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self, seconds=60):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], seconds)
            data = os.read(self.read, 1 << 20) if ready else b""
            assert data, "Chromium does not answer"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        event = json.loads(message)
        method, what = event.get("method"), event.get("params", {})
        if method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(what)
        elif method == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded += 1
        return event

    def open(self, path, width, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844,
            deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        wanted = self.loaded + 1
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self.loaded < wanted:
            self._next()

    def value(self, script):
        """What JavaScript says."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path, top=0, height=None):
        width = self.value("innerWidth")
        height = height or self.value("document.documentElement.scrollHeight") - top
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        try:
            self.session = None
            self.call("Browser.close")
        finally:
            for pipe in (self.read, self.write):
                os.close(pipe)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def opened(folder):
    """A browser, once it answers."""
    started = time.monotonic()
    browser = Browser(folder)
    assert time.monotonic() - started < 60
    return browser
