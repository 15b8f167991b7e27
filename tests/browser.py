"""A real browser for the tests of the pages."""

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any


class Browser:
    """Headless Chromium, driven through its debugging pipe: JSON messages that end in a zero byte; no driver, no port.

    `console` holds what the page that is open has said there. Downloads go to `folder`.
    """

    def __init__(self, folder: Path):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-pipe",
                   f"--user-data-dir={folder / 'profile'}", "about:blank"]
        (self.read_end, write_end), (read_end, self.write_end) = os.pipe(), os.pipe()

        def as_3_and_4() -> None:
            parked = os.dup(read_end), os.dup(write_end)   # either may be 3 or 4 itself
            os.dup2(parked[0], 3)
            os.dup2(parked[1], 4)

        self.folder = folder
        self.process = subprocess.Popen(command, preexec_fn=as_3_and_4, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self.buffer, self.number, self.session, self.console = b"", 0, None, []
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.read_end], [], [], 60)[0], "the browser does not answer"
            self.buffer += os.read(self.read_end, 1 << 16)
        message, _, self.buffer = self.buffer.partition(b"\0")
        found = json.loads(message)
        if found.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(found["params"])
        return found

    def call(self, method: str, **parameters: Any) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def load(self, method: str, **parameters: Any) -> None:
        # The page before may still be loading on a busy machine: its event must not be taken for that of the next one.
        self.value("document.readyState == 'complete' || "
                   "new Promise(done => addEventListener('load', () => setTimeout(done)))")
        self.console.clear()
        self.call(method, **parameters)
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def open(self, page: Path, width: int = 1100) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 600)
        self.load("Page.navigate", url=page.as_uri())

    def reload(self) -> None:
        self.load("Page.reload")

    def press(self, key: str) -> None:
        letter = len(key) == 1
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if letter and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=f"Key{key.upper()}" if letter else key, **text)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; a promise is waited for. Counts as done by the person at the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
                           userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)
