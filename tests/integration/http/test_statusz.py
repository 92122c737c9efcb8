"""The page in a real browser, over a real server: live, calm, for everybody, and alone with itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import grpc
import pytest
import pytest_asyncio

from embedserve.testing.backends import FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1.embedding_pb2 import EmbedRequest
from tests.integration.http.browser import CHROMIUM, Browser, Page

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"),
]

SETTINGS = {"operations.enabled": "true"}
TIGHT = {**SETTINGS, "limits.max_texts": "8", "scheduling.max_queue_items": "8"}
HOSTILE = '<img src=x onerror="document.title=1">'
CALLS = "[...document.querySelectorAll('.part-load dd')].at(-1).textContent"
TAB, ENTER = ("Tab", 9), ("Enter", 13)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


async def call(server: InProcessServer, texts: int = 1, tenant: str = HOSTILE) -> None:
    """A call that may be refused."""
    try:
        await server.stub.Embed(
            EmbedRequest(texts=["hello world"] * texts), metadata=(("x-embedserve-tenant", tenant),), timeout=30
        )
    except grpc.aio.AioRpcError as error:
        assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)  # noqa: PT017


async def until(page: Page, condition: str) -> Any:
    """Once it is so, with the page asked to refresh at once in place of its 2 s: as when somebody comes back to it."""
    return await page.until(f"document.dispatchEvent(new Event('visibilitychange')) && ({condition})", every_ms=250)


async def open_page(page: Page, server: InProcessServer) -> None:
    await page.open(f"{server.operations_url}/statusz")
    await page.until("!document.getElementById('pause').hidden")


class TestLive:
    """What is shown follows the server without a reload, and says so when it cannot."""

    async def test_a_figure_moves_under_load_and_nothing_else_is_asked_for(self, browser: Browser) -> None:
        async with serving(settings=SETTINGS) as server, browser.page() as page:
            await open_page(page, server)
            await page.run("document.getElementById('load').dataset.mark = 'kept'")
            for _ in range(7):
                await call(server)
            await page.until(f"{CALLS} === 'OK 7'")

            assert await page.run("document.getElementById('load').isConnected")
            assert page.complaints == []
            assert set(page.requests) == {f"{server.operations_url}/statusz"}
            assert len(page.requests) >= 2

    async def test_the_page_that_is_hidden_or_paused_asks_for_nothing(self, browser: Browser) -> None:
        async with serving(settings=SETTINGS) as server, browser.page() as page:
            await open_page(page, server)
            await page.run("document.getElementById('pause').click()")
            assert await page.run("document.getElementById('fresh').textContent.startsWith('Paused')")
            asked = len(page.requests)
            await call(server)
            await page.run("new Promise((done) => setTimeout(done, 2500))")
            assert len(page.requests) == asked

            await page.run("document.getElementById('pause').click()")
            await page.until(f"{CALLS} === 'OK 1'")

    async def test_a_server_that_has_gone_makes_it_stale_since_then(self, browser: Browser) -> None:
        async with browser.page() as page:
            async with serving(settings=SETTINGS) as server:
                await open_page(page, server)
                assert await page.run("document.getElementById('stale').hidden")
            said = await until(page, "document.getElementById('stale').textContent")

            assert said.startswith("Stale since ")
            assert "the server does not answer" in said
            assert "Serving" in await page.run("document.querySelector('h1').textContent")

    async def test_a_change_of_state_is_read_out_and_figures_are_not(self, browser: Browser) -> None:
        plan = FaultPlan()
        settings = {**SETTINGS, "health.stall_ms": "200"}
        async with serving(FaultyBackend(plan), settings=settings) as server, browser.page() as page:
            await open_page(page, server)
            plan.gate.clear()
            stuck = asyncio.create_task(call(server))
            await until(page, "document.querySelector('h1').textContent.startsWith('Stalled since')")

            assert await page.run("document.getElementById('announce').textContent") == "Stalled"
            assert await page.run("document.title.startsWith('Stalled')")
            plan.gate.set()
            await stuck
            await until(page, "document.getElementById('announce').textContent.startsWith('Serving')")
            assert page.complaints == []

    async def test_before_the_model_is_there_it_says_what_is_awaited(self, browser: Browser) -> None:
        plan = FaultPlan(fail_check=True)
        plan.gate.clear()
        backend = FaultyBackend(plan)
        async with serving(backend, settings=SETTINGS, wait_ready=False) as server, browser.page() as page:
            await open_page(page, server)
            assert (await page.run("document.querySelector('h1').textContent")).startswith("Warming up for")

            plan.gate.set()
            await until(page, "document.querySelector('h1').textContent.startsWith('Serving')")


class TestEverybody:
    """By keyboard, by ear, in the dark, on a telephone and without a script."""

    async def test_each_control_can_be_reached_by_keyboard_and_shows_that_it_is(self, browser: Browser) -> None:
        async with serving(settings=SETTINGS) as server, browser.page() as page:
            await open_page(page, server)
            reached = []
            for _ in range(10):
                await page.press(*TAB)
                ring = "getComputedStyle(document.activeElement).outlineStyle"
                reached.append((await page.run("document.activeElement.textContent"), await page.run(ring)))

            assert [name for name, _ in reached][:2] == ["Skip to the state", "Load"]
            assert reached[9] == ("Pause", "solid")
            assert {ring for _, ring in reached} == {"solid"}
            await page.press(*ENTER)
            assert await page.run("document.activeElement.textContent") == "Resume"

    async def test_focus_stays_while_figures_change(self, browser: Browser) -> None:
        async with serving(settings=SETTINGS) as server, browser.page() as page:
            await open_page(page, server)
            await page.run("document.querySelector('.part-latency .scroll').focus()")
            await call(server)
            await until(page, f"{CALLS} === 'OK 1'")

            assert await page.run("document.activeElement.closest('.part-latency') !== null")

    @pytest.mark.parametrize(("scheme", "width"), [("light", 320), ("dark", 1280)])
    async def test_axe_finds_nothing(self, browser: Browser, scheme: str, width: int) -> None:
        axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
        async with _troubled() as server, browser.page(width, scheme=scheme) as page:
            await open_page(page, server)
            await page.run(axe)
            found = await page.run(
                "axe.run().then((all) => ({"
                "  wrong: all.violations.map((one) => ({ id: one.id, where: one.nodes.map((node) => node.html) })),"
                "  kept: all.passes.map((one) => one.id) }))"
            )
            dark = await page.run("matchMedia('(prefers-color-scheme: dark)').matches")

        assert found["wrong"] == []
        assert {"color-contrast", "landmark-one-main"} <= set(found["kept"])
        assert ("scrollable-region-focusable" in found["kept"]) == (width == 320)
        assert dark == (scheme == "dark")

    @pytest.mark.parametrize("width", [320, 768, 1280])
    async def test_the_page_never_scrolls_sideways(self, browser: Browser, width: int) -> None:
        async with _troubled() as server, browser.page(width, 800) as page:
            await open_page(page, server)

            assert await page.run("document.documentElement.scrollWidth") <= width

    async def test_without_a_script_it_is_a_snapshot_with_a_link(self, browser: Browser) -> None:
        async with _troubled() as server, browser.page() as page:
            await page.send("Emulation.setScriptExecutionDisabled", value=True)
            await page.open(f"{server.operations_url}/statusz")
            tree = await page.send("DOMSnapshot.captureSnapshot", computedStyles=[])
            shown = {tree["strings"][at] for at in tree["documents"][0]["layout"]["text"] if at >= 0}

        assert {"Refresh", "QUEUE_FULL", "Admission"} <= shown
        assert "Pause" not in shown


class TestHostile:
    """A caller's words are shown as words."""

    async def test_a_tenant_that_is_markup_is_read_and_not_run(self, browser: Browser) -> None:
        async with _troubled() as server, browser.page() as page:
            await open_page(page, server)
            title = await page.run("document.title")

            assert await page.run("document.querySelectorAll('img').length") == 0
            assert HOSTILE in await page.run("document.querySelector('.part-requests').textContent")
            assert title != "1"
            assert page.complaints == []

    async def test_a_script_of_somebody_elses_is_not_run(self, browser: Browser) -> None:
        async with serving(settings=SETTINGS) as server, browser.page() as page:
            await open_page(page, server)
            await page.run(
                "(() => { const evil = document.createElement('script'); evil.textContent = 'window.evil = 1';"
                " document.body.append(evil); document.body.style.color = 'red'; document.body.insertAdjacentHTML("
                " 'beforeend', '<p id=styled style=\"display:none\">x</p>'); })()"
            )

            assert await page.run("window.evil === undefined")
            assert await page.run("getComputedStyle(document.getElementById('styled')).display") == "block"
            assert page.complaints, "the policy tells the console what it has refused"


class TestSwitch:
    """``operations.statusz`` takes the page away, and with it what it costs."""

    async def test_off(self, browser: Browser) -> None:
        async with serving(settings={**SETTINGS, "operations.statusz": "false"}) as server, browser.page() as page:
            await page.open(f"{server.operations_url}/statusz")

            assert "operations.statusz = false" in await page.run("document.body.textContent")


def _troubled() -> Any:
    """A server whose every section has something to show: answered, refused and waiting calls."""
    return _Troubled()


class _Troubled:
    async def __aenter__(self) -> InProcessServer:
        self._plan = FaultPlan()
        self._serving = serving(FaultyBackend(self._plan), settings=TIGHT)
        server = await self._serving.__aenter__()
        for _ in range(4):
            await call(server)
        self._plan.gate.clear()
        self._held = [asyncio.create_task(call(server, 4)) for _ in range(2)]
        while server.engine.scheduler.depth.running_items + server.engine.scheduler.depth.waiting_items < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(3):
            await call(server, 4)
        return server

    async def __aexit__(self, *told: object) -> None:
        self._plan.gate.set()
        await asyncio.gather(*self._held)
        await self._serving.__aexit__(*told)
