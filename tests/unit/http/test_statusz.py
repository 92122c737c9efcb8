"""What the page says, that nothing on it can be markup, and what a browser is told."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import pytest

from embedserve.http.statusz.charts import bar, line
from embedserve.http.statusz.markup import Html, foreign, tag
from embedserve.http.statusz.page import CONTENT_SECURITY_POLICY, render
from embedserve.http.statusz.reasons import POLICIES, REASONS
from embedserve.http.statusz.verdict import Verdict, judge
from embedserve.http.statusz.words import amount, clock, duration, share, size
from embedserve.snapshot import Change, Latency, Requests
from embedserve.telemetry.instruments import REFUSALS
from tests.unit.http.snapshots import (
    BUCKETS,
    MODEL,
    NOON,
    PROCESS,
    SERVING,
    TRACE,
    TRAFFIC,
    ended,
    engine,
    refusal,
    shedding,
    snapshot,
)

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"
BENT = "good\u202etxt.exe\x00\x1b[31m"
"""Turns the direction of what follows, ends a string in C, colours a terminal."""


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.found if found == name]


def answers(verdict: Verdict) -> dict[str, str]:
    return {answer.question: answer.answer for answer in verdict.answers}


class TestWords:
    """Three digits at most, the unit that fits, and nothing that is there is written as nothing."""

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [
            (None, "–"), (0.0, "0 s"), (0.0000123, "12.3 µs"), (0.00099999, "1,000 µs"), (0.0015, "1.5 ms"),
            (0.999, "999 ms"), (1.0, "1 s"), (60.0, "60 s"), (119.96, "120 s"), (125.0, "2 min 5 s"),
            (7200.0, "2 h"), (7260.0, "2 h 1 min"), (180_000.0, "2 d 2 h"),
        ],
    )  # fmt: skip
    def test_durations(self, seconds: float | None, said: str) -> None:
        assert duration(seconds) == said.replace(" ", "\xa0")

    @pytest.mark.parametrize(
        ("part", "said"),
        [
            (None, "–"),
            (0.0, "0 %"),
            (0.0004, "<0.1 %"),
            (0.043, "4.3 %"),
            (0.97, "97 %"),
            (0.9996, "99 %"),
            (1, "100 %"),
        ],
    )
    def test_shares(self, part: float | None, said: str) -> None:
        assert share(part) == said.replace(" ", "\xa0")

    def test_amounts_and_sizes(self) -> None:
        assert [amount(value) for value in (0, 0.25, 9.996, 99.96, 12_345.6)] == ["0", "0.25", "10", "100", "12,346"]
        assert [size(value) for value in (0, 2048, 5 << 30)] == ["0\xa0B", "2\xa0KiB", "5\xa0GiB"]

    def test_an_instant_of_another_day_has_its_date(self) -> None:
        assert clock(NOON - 60, NOON) == "11:59:00"
        assert clock(NOON - 86_400, NOON) == "20 Nov 12:00:00"


class TestMarkup:
    """A plain string can never be markup, wherever it stands."""

    def test_text_and_attributes_are_escaped(self) -> None:
        made = tag("p", HOSTILE, title=HOSTILE)

        assert Elements(made).found == [("p", {"title": HOSTILE})]
        assert "".join(Elements(made).text) == HOSTILE

    def test_what_cannot_be_seen_is_shown_as_its_code(self) -> None:
        assert foreign(BENT) == "<bdi>good\\u202etxt.exe\\u0000\\u001b[31m</bdi>"

    def test_markup_is_taken_as_it_is_and_attributes_may_be_left_out(self) -> None:
        made = tag("a", tag("b", "x"), None, ["y", Html("<i>z</i>")], href=None, hidden=True, id=False)

        assert made == "<a hidden><b>x</b>y<i>z</i></a>"


class TestVerdict:
    """The first sentence says how things are, and the headline changes only when the state does."""

    def test_serving(self) -> None:
        verdict = judge(SERVING)

        assert (verdict.level, verdict.headline) == ("good", "Serving")
        assert verdict.sentence == "Serving 200 calls/s. Device 42\xa0% busy."

    def test_a_full_device_that_sheds(self) -> None:
        verdict = judge(shedding())

        assert (verdict.level, verdict.headline) == ("warn", "Serving, device is full, shedding")
        said = "Serving 176 calls/s. Device 97 % busy since 11:58:13, shedding 12 % by latency_p95 since 11:59:00."
        assert verdict.sentence == said.replace(" %", "\xa0%")
        told = answers(verdict)
        assert told["What is the bottleneck?"].startswith("The device: 97\xa0% busy since 11:58:13.")
        assert REASONS["P95_EXCEEDED"] in told["What is refused, and why?"]

    def test_the_tokenizer_is_named_where_it_is_what_is_full(self) -> None:
        device, tokenizer, loop = SERVING.resources
        full = dataclasses.replace(tokenizer, busy=0.98, full_since_s=NOON - 30)

        verdict = judge(snapshot(resources=(device, full, loop)))

        assert verdict.headline == "Serving, tokenizer is full"
        assert "The tokenizer: 98\xa0% busy since 11:59:30" in answers(verdict)["What is the bottleneck?"]

    def test_refusals_without_a_bottleneck_are_wondered_at(self) -> None:
        told = answers(judge(shedding(resources=SERVING.resources)))
        assert told["What is the bottleneck?"].startswith("Nothing is near to full, and yet calls are refused")

        device, *others = SERVING.resources
        near = judge(shedding(resources=(dataclasses.replace(device, busy=0.81), *others)))
        assert answers(near)["What is the bottleneck?"].startswith("The device is near to full. Busy: device 81")

    def test_idle(self) -> None:
        quiet = dataclasses.replace(TRAFFIC, calls_per_s=0.0, in_flight=0)

        assert judge(snapshot(traffic=quiet)).sentence == "Serving. Idle: no call in the last 10 s."

    @pytest.mark.parametrize(
        ("state", "level", "begins"),
        [
            ("starting", "wait", "Starting for 4\xa0s"),
            ("warming", "wait", "Warming up for 4\xa0s"),
            ("stalled", "bad", "Stalled since 11:59:56: a pass has been at work for 4\xa0ms"),
            ("draining", "wait", "Draining since 11:59:56: 5 calls to be answered"),
            ("stopped", "wait", "Stopped since 11:59:56"),
            ("failed", "bad", "Failed at 11:59:56"),
        ],
    )
    def test_every_other_state_of_the_lifecycle(self, state: str, level: str, begins: str) -> None:
        process = dataclasses.replace(PROCESS, state=state, since_s=NOON - 4, changes=(Change(state, NOON - 4),))
        verdict = judge(snapshot(process=process))

        assert verdict.level == level
        assert verdict.sentence.startswith(begins)

    @pytest.mark.parametrize(("per_s", "level"), [(1.0, "warn"), (20.0, "bad")])
    def test_failures_are_the_trouble_when_there_are_many(self, per_s: float, level: str) -> None:
        traffic = dataclasses.replace(TRAFFIC, failed_per_s=per_s, failing_since_s=NOON - 20)
        requests = dataclasses.replace(SERVING.requests, failed=(ended(status="INTERNAL"),))
        verdict = judge(snapshot(traffic=traffic, requests=requests))

        assert verdict.level == level
        assert "the last one: INTERNAL" in answers(verdict)["Do calls fail?"]

    def test_callers_mistakes_are_no_failures_and_not_served_either(self) -> None:
        verdict = judge(
            snapshot(traffic=dataclasses.replace(TRAFFIC, mistaken_per_s=150.0, last_mistake="INVALID_ARGUMENT"))
        )

        assert verdict.level == "good"
        assert verdict.sentence.startswith("Serving 50 calls/s.")
        told = answers(verdict)["Do calls fail?"]
        assert told.endswith("By callers' own doing: 150/s, the last one INVALID_ARGUMENT.")

    def test_the_slow_length_is_named(self) -> None:
        assert answers(judge(SERVING))["Which length is slow?"].startswith("Slowest: up to 512 tokens, P95 500\xa0ms")

    def test_a_length_with_a_handful_of_calls_says_nothing(self) -> None:
        rare = dataclasses.replace(BUCKETS[1], total=Latency(2, 0.2, 9.0, 9.0))
        told = answers(judge(snapshot(buckets=(BUCKETS[0], rare))))

        assert told["Which length is slow?"].startswith("All calls are of one length: up to 16 tokens")

    def test_refusals_that_are_over_are_told_as_past(self) -> None:
        admission = dataclasses.replace(SERVING.admission, refusals=(refusal(since_s=None, last_s=NOON - 90),))
        told = answers(judge(snapshot(admission=admission)))

        assert told["What is refused, and why?"] == "Nothing now; 240 calls in the last 5\xa0min, until 11:58:30."

    def test_a_front_end_that_is_silent_is_trouble(self) -> None:
        process = dataclasses.replace(PROCESS, front_ends=("frontend-0",), silent=("frontend-1",))
        verdict = judge(snapshot(process=process))
        assert (verdict.level, verdict.headline) == ("warn", "Serving, a front end is silent")
        assert "frontend-1 does not answer" in verdict.sentence

    def test_an_engine_that_is_silent_or_lost_is_trouble(self) -> None:
        engines = (engine("engine-0", shown=True), engine("engine-1", state="silent"), engine("engine-2", state="lost"))
        verdict = judge(snapshot(process=dataclasses.replace(PROCESS, engines=engines)))
        assert (verdict.level, verdict.headline) == ("warn", "Serving, an engine is silent")
        assert "engine-1, engine-2 gets no calls" in verdict.sentence
        well = judge(snapshot(process=dataclasses.replace(PROCESS, engines=engines[:1])))
        assert well == judge(snapshot())


class TestReasons:
    """Every reason and every policy of a refusal has its words."""

    def test_all_of_them(self) -> None:
        assert {reason for _, reason, _ in REFUSALS} <= set(REASONS)
        assert {policy for policy, _, _ in REFUSALS} <= set(POLICIES)


class TestCharts:
    """A picture is always told in words or stands beside its number."""

    def test_a_line_says_its_range(self) -> None:
        assert 'aria-label="calls: from 1 to 3, now 2"' in line((None, 1.0, 3.0, 2.0), amount, "calls")

    def test_a_line_without_values_is_empty(self) -> None:
        assert 'aria-label="calls: none"' in line((None, None), amount, "calls")

    @pytest.mark.parametrize(("part", "width"), [(None, "0.0"), (0.5, "50.0"), (7.0, "100.0"), (-1.0, "0.0")])
    def test_a_bar_stays_within_its_frame(self, part: float | None, width: str) -> None:
        assert f'width="{width}"' in bar(part)


class TestPage:
    """One file that asks nobody else for anything, and tells hostile names as text."""

    def test_it_refers_to_nothing_outside(self) -> None:
        page = Elements(render(shedding(requests=dataclasses.replace(SERVING.requests, slow=(ended(),)))))

        addresses = {
            value
            for _, attributes in page.found
            for name, value in attributes.items()
            if name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href")
        }
        assert {a for a in addresses if a is not None and not a.startswith("#")} == {"data:,", "statusz"}
        assert "url(" not in render(SERVING)
        assert "@import" not in render(SERVING)

    def test_the_policy_allows_its_own_style_and_script_and_no_other(self) -> None:
        page = render(SERVING)
        for name in ("style", "script"):
            (source,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert f"{name}-src 'sha256-{digest}'" in CONTENT_SECURITY_POLICY
        assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'; ")
        assert "unsafe" not in CONTENT_SECURITY_POLICY

    def test_no_element_has_a_style_or_a_handler_of_its_own(self) -> None:
        names = {name for _, attributes in Elements(render(shedding())).found for name in attributes}

        assert not {name for name in names if name == "style" or name.startswith("on")}

    def test_hostile_names_stay_text(self) -> None:
        page = Elements(
            render(
                shedding(
                    model=dataclasses.replace(MODEL, name=HOSTILE, revision=BENT),
                    process=dataclasses.replace(PROCESS, host=HOSTILE, addresses=(f"unix:{HOSTILE}",)),
                    requests=dataclasses.replace(
                        SERVING.requests,
                        slow=(ended(tenant=HOSTILE, trace_id=HOSTILE),),
                        refused=(ended(reason=HOSTILE, policy=HOSTILE, status=HOSTILE),),
                        failed=(ended(method=HOSTILE),),
                    ),
                    admission=dataclasses.replace(
                        shedding().admission, refusals=(refusal(reason=HOSTILE, policy=HOSTILE),)
                    ),
                )
            )
        )

        assert len(page.named("script")) == 1
        assert page.named("img") == []
        assert page.text.count(HOSTILE) >= 7
        assert not any("\u202e" in text or "\x1b" in text for text in page.text)

    def test_ids_are_unique_and_every_reference_is_met(self) -> None:
        page = Elements(render(shedding()))
        ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]

        assert len(ids) == len(set(ids))
        asked = {attributes["aria-labelledby"] for _, attributes in page.found if "aria-labelledby" in attributes}
        linked = {(attributes["href"] or "")[1:] for attributes in page.named("a") if "#" in (attributes["href"] or "")}
        assert asked | linked <= set(ids)

    def test_figures_of_each_section_are_there(self) -> None:
        slow = dataclasses.replace(SERVING.requests, slow=(ended(),))
        said = " ".join(Elements(render(shedding(requests=slow))).text)

        for figure in (
            "acme/model", "abc123", "sha256:" + "0" * 64, "pid 4711", "1.2.3", "float32, cpu, compiled",  # process
            "1\xa0h", "up to 512", "400", "300\xa0ms",  # queue
            "97\xa0%", "230 of 4,096", "8.2 of 512",  # passes
            "refuses: P95_EXCEEDED", "P95 500\xa0ms of 500\xa0ms", "1,000",  # admission
            TRACE, "queue 400\xa0ms", "search",  # requests
        ):  # fmt: skip
            assert figure in said, figure

    def test_with_several_front_ends_each_call_says_which_one_took_it(self) -> None:
        """And who did not answer; one process alone has no such column."""
        calls = Requests((ended(process="frontend-0"),), (ended(process="frontend-1"),), ())
        process = dataclasses.replace(PROCESS, front_ends=("frontend-0", "frontend-1"), silent=("frontend-2",))
        page = Elements(render(snapshot(process=process, requests=calls)))
        assert page.text.count("process") == 2, "a head of each table that has calls"
        assert {"frontend-0", "frontend-1", "frontend-0, frontend-1"} <= set(page.text)
        assert " frontend-2 did not answer: its calls are missing here" in page.text
        alone = Elements(render(snapshot(requests=Requests((ended(),), (ended(),), ()))))
        assert "process" not in alone.text
        assert "did not answer" not in " ".join(alone.text)

    def test_several_engines_have_a_row_each_and_it_is_said_whose_the_figures_are(self) -> None:
        engines = (engine("engine-0", state="silent"), engine("engine-1", shown=True))
        page = Elements(render(snapshot(process=dataclasses.replace(PROCESS, engines=engines))))
        assert {"engine-0", "engine-1", "cuda:7", "silent", "12,345"} <= set(page.text)
        assert any("those of engine-1, calls" in text for text in page.text)
        assert not any("Engines" in text for text in Elements(render(snapshot())).text)

    def test_a_process_that_has_only_begun_can_be_shown(self) -> None:
        empty = Latency(0)
        young = snapshot(
            process=dataclasses.replace(PROCESS, state="starting", since_s=NOON, addresses=()),
            model=dataclasses.replace(
                MODEL, dimension=None, dtype=None, device=None, pooling=None, compiled=None, tokenizer_digest=None
            ),
            resources=tuple(dataclasses.replace(r, busy=0.0, history=(None,) * 60) for r in SERVING.resources),
            buckets=tuple(dataclasses.replace(b, items=0, wait=empty, total=empty) for b in BUCKETS),
            latency=empty,
            stages=tuple(dataclasses.replace(stage, latency=empty) for stage in SERVING.stages),
            batches=dataclasses.replace(
                SERVING.batches, passes=0, rows=None, tokens=None, efficiency=None, duration=empty, outcomes={}
            ),
            device=dataclasses.replace(SERVING.device, pass_age_s=None, last_pass_s=None),
        )

        assert "not loaded yet" in render(young)
