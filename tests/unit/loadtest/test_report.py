"""The page that a run leaves."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from loadtest import client
from loadtest.drive import drive
from loadtest.plot import Band, Line, bars, chart
from loadtest.report import page_of
from loadtest.scenario import Marks
from loadtest.summary import judged, summarised
from tests.unit.loadtest import targets
from tests.unit.loadtest.scenarios import scenario


class Page(HTMLParser):
    """Tags as they are nested, text, and everything that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "action", "data"}
        ]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


async def result(target: Any, *phases: dict[str, Any], **more: Any) -> dict[str, Any]:
    asked = scenario(*phases, **more)
    run = await drive(asked, target, processes=0)
    repetitions = [{**run.figures(), "server": {}}]
    summary = summarised(repetitions)
    machine = {"cpu": "c", "cores": 2, "memory_gib": 1.0, "system": "s"}
    facts = {"command": "x", "begun": "now", "commit": "abc", "uncommitted_changes": False, "versions": {"python": "3"}}
    return {
        **facts,
        "target": "<b>host</b>:1",
        "preliminary": True,
        "load_average_before": [1.0],
        "machine": machine,
        "scenario": asked.model_dump(mode="json"),
        "summary": summary,
        "marks": judged(Marks(p99_ms_at_most=1e-9), summary),
        "repetitions": repetitions,
    }


class TestPage:
    async def test_is_well_formed_and_fetches_nothing(self):
        text = page_of(await result(targets.Refusing, {"rate": 200.0}, {"callers": 2}))
        page = Page(text)
        assert page.open == []
        assert page.fetched == []
        assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|<script|<link|<img", text)

    async def test_has_every_plot(self):
        page = Page(page_of(await result(targets.Refusing, {"rate": 200.0}, {"callers": 2})))
        words = "".join(page.words)
        for title in ("Latency against rate", "Percentiles", "Timeline", "Batch sizes", "Padding efficiency",
                      "Rejects by reason"):  # fmt: skip
            assert title in words
        assert page.tags.count("svg") >= 5
        assert "RESOURCE_EXHAUSTED QUEUE_FULL" in words

    async def test_follows_the_reader_s_choice_of_light_and_dark(self):
        text = page_of(await result(targets.Prompt, {"callers": 1, "seconds": 0.1}))
        assert "prefers-color-scheme: dark" in text

    async def test_what_others_wrote_stays_text(self):
        text = page_of(await result(targets.Prompt, {"callers": 1, "seconds": 0.1}))
        assert "<b>host" not in text

    async def test_says_first_that_a_run_is_void_or_missed_a_mark(self):
        void = page_of(await result(targets.Slow, {"rate": 800.0, "seconds": 0.2}))
        assert "VOID" in void
        assert void.index("VOID") < void.index("<table")
        assert "missed" in page_of(await result(targets.Prompt, {"callers": 1, "seconds": 0.1}))

    async def test_a_run_without_any_answer_still_has_a_page(self, monkeypatch):
        monkeypatch.setattr(client, "GRACE_S", 0.05)
        page = Page(page_of(await result(targets.Hanging, {"callers": 1, "seconds": 0.1}, timeout_s=0.01)))
        assert page.open == []


class TestPlot:
    def test_nothing_is_a_sentence(self):
        assert "Nothing to show" in chart([], x_label="x", y_label="y")
        assert "Nothing to show" in bars([])

    @pytest.mark.parametrize("log_y", [False, True])
    def test_all_points_lie_within_the_picture(self, log_y):
        rng = np.random.default_rng(17)
        for _ in range(200):
            count = int(rng.integers(1, 8))
            scale = 10.0 ** rng.integers(-6, 7)
            x = sorted((rng.random(count) * scale).tolist())
            y = [None if rng.random() < 0.1 else float(v) for v in rng.random(count) * scale]
            svg = chart(
                [Line("l", x, y, points=True)], x_label="x", y_label="y", log_y=log_y, bands=[Band("b", 0.0, x[-1])]
            )
            for cx, cy in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', svg):
                assert 0 <= float(cx) <= 720
                assert 0 <= float(cy) <= 300

    def test_a_gap_breaks_the_line(self):
        svg = chart([Line("l", [0, 1, 2, 3], [1.0, 2.0, None, 3.0])], x_label="x", y_label="y")
        (path,) = re.findall(r' d="([^"]*)"', svg)
        assert path.count("M") == 2
