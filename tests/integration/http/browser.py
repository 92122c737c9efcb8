"""A real Chromium without a window, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol).

No driver is installed for it: the protocol is JSON over a WebSocket, which aiohttp speaks. What the page asks for, says
on its console and throws is kept from the first moment on.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMIT_S = 40.0
FLAGS = (
    "--headless=new", "--remote-debugging-port=0", "--no-sandbox", "--no-first-run", "--disable-gpu",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--mute-audio", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One process of Chromium."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is for its profile."""
        self._directory = directory
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._number = 0

    async def __aenter__(self) -> Self:
        assert CHROMIUM is not None
        flags = (*FLAGS, f"--user-data-dir={self._directory}", "about:blank")
        self._process = await asyncio.create_subprocess_exec(
            CHROMIUM, *flags, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(LIMIT_S):
            address = await self._address()
            self._session = aiohttp.ClientSession()
            self._socket = await self._session.ws_connect(address, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        await self._session.close()
        self._process.terminate()
        await self._process.wait()

    async def _address(self) -> str:
        assert self._process.stderr is not None
        heard = []
        async for line in self._process.stderr:
            heard.append(line.decode(errors="replace"))
            if "DevTools listening on " in heard[-1]:
                return heard[-1].rpartition(" ")[2].strip()
        raise AssertionError("Chromium did not start:\n" + "".join(heard))

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif (page := self._pages.get(told.get("sessionId", ""))) is not None:
                page.hear(told["method"], told["params"])

    async def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        target = {} if session is None else {"sessionId": session}
        await self._socket.send_json({"id": self._number, "method": method, "params": params, **target})
        async with asyncio.timeout(LIMIT_S):
            told = await answer
        assert "error" not in told, f"{method}: {told['error']}"
        result: dict[str, Any] = told["result"]
        return result

    @asynccontextmanager
    async def page(self, width: int = 1280, height: int = 900, *, scheme: str = "light") -> AsyncIterator[Page]:
        """A new page in a window of that size."""
        context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            await page.send(f"{domain}.enable")
        await page.resize(width, height)
        await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        yield page
        await self.send("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """One page, and what it did."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.complaints: list[str] = []
        """Errors and warnings of the console, exceptions, and what the security policy refused."""
        self.requests: list[str] = []
        """Addresses that it asked for."""
        self._loaded = asyncio.Event()

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command to this page."""
        return await self._browser.send(method, self._session, **params)

    def hear(self, event: str, params: dict[str, Any]) -> None:
        """Keep what happened."""
        match event:
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
            case "Page.loadEventFired":
                self._loaded.set()

    async def open(self, url: str) -> None:
        """Go there, until it is loaded."""
        self._loaded.clear()
        await self.send("Page.navigate", url=url)
        async with asyncio.timeout(LIMIT_S):
            await self._loaded.wait()

    async def resize(self, width: int, height: int) -> None:
        """Another size of window, in CSS pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def run(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise. The page's policy does not bind it."""
        told = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, condition: str, *, every_ms: int = 20) -> Any:
        """The value of an expression, once it is something."""
        # Looked for by the page itself: one question, however long it takes.
        again = f"setTimeout(look, {every_ms})"
        look = f"() => {{ const found = ({condition}); found ? done(found) : {again} }}"
        return await self.run(f"new Promise((done) => {{ const look = {look}; look() }})")

    async def press(self, key: str, code: int) -> None:
        """Press a key."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if kind == "char" and key == "Enter" else {}
            if kind != "char" or text:
                await self.send(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
                )

    async def picture(self, path: Path) -> None:
        """The page from top to bottom, however long it is."""
        size = (await self.send("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        told = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(told["data"]))  # noqa: ASYNC240 - a test's own file
