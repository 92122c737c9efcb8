"""How a scenario is driven."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from loadtest import client
from loadtest.drive import TargetFailed, drive
from loadtest.schedule import arrivals
from tests.unit.loadtest import targets
from tests.unit.loadtest.scenarios import scenario


class TestTime:
    async def test_a_latency_counts_from_the_instant_meant(self):
        """A client that is held up for 0.4 s has all the calls of that time late, though each is answered at once."""
        result = await drive(scenario({"rate": 200.0, "seconds": 1.0}), targets.Stalling, processes=0)
        rows = result.ledger.rows
        late = rows[(rows["ended"] - rows["meant"]) > 0.1]
        # 0.3 s of 200 calls a second were sent more than 0.1 s after their time: 60, Poisson.
        assert len(late) >= 30
        assert np.median(late["ended"] - late["sent"]) < 0.1
        assert result.figures()["phases"][0]["latency_ms"]["p90"] > 100

    async def test_every_call_of_the_schedule_is_sent_once_at_its_time(self):
        asked = scenario({"rate": 300.0}, {"rate": 100.0})
        result = await drive(asked, targets.Prompt, processes=0)
        rows = result.ledger.rows
        assert np.sort(rows["meant"]).tolist() == arrivals(result.spans, asked.seed).tolist()
        assert (rows["sent"] >= rows["meant"] - 1e-4).all()

    async def test_a_call_belongs_to_the_phase_it_was_meant_for(self):
        result = await drive(scenario({"rate": 300.0}, {"rate": 100.0}), targets.Prompt, processes=0)
        rows = result.ledger.rows
        assert ((rows["meant"] >= 0.5) == (rows["phase"] == 1)).all()


class TestClosedLoop:
    async def test_callers_wait_for_their_answers(self):
        class Counting(targets.Prompt):
            running = most = 0

            async def embed(self, texts, *, timeout_s):
                Counting.running += 1
                Counting.most = max(Counting.most, Counting.running)
                reply = await super().embed(texts, timeout_s=timeout_s)
                Counting.running -= 1
                return reply

        result = await drive(scenario({"callers": 3, "seconds": 0.2}), Counting, processes=0)
        assert Counting.most == 3
        assert (result.ledger.rows["meant"] == result.ledger.rows["sent"]).all()

    async def test_texts_come_in_their_order_whatever_the_number_of_callers(self):
        made = []

        def make():
            made.append(targets.Prompt())
            return made[-1]

        asked = scenario({"callers": 5, "seconds": 0.2})
        await drive(asked, make, processes=0)
        expected = client.calls_of(asked)
        assert made[0].sent[:64] == expected[:64]


class TestCapacity:
    async def test_is_measured_where_a_phase_needs_it(self):
        asked = scenario({"of_capacity": 0.01, "seconds": 0.3}, capacity={"callers": 2, "seconds": 0.2})
        result = await drive(asked, targets.Prompt, processes=0)
        assert result.capacity
        assert result.figures()["phases"][0]["rate"] == pytest.approx(0.01 * result.capacity)

    async def test_a_given_one_is_taken(self):
        result = await drive(scenario({"of_capacity": 0.5}), targets.Prompt, processes=0, capacity=100.0)
        assert result.figures()["phases"][0]["rate"] == 50.0


class TestVoid:
    async def test_a_client_that_is_too_slow_makes_no_figures(self):
        result = await drive(scenario({"rate": 800.0, "seconds": 0.2}), targets.Slow, processes=0)
        assert result.figures()["phases"][0]["offered_share"] < 0.9
        (reason,) = result.void
        assert "less than 99%" in reason
        assert "800 calls/s" in reason

    async def test_a_server_that_answers_nothing_makes_none_either(self, monkeypatch):
        monkeypatch.setattr(client, "GRACE_S", 0.05)
        result = await drive(scenario({"callers": 1, "seconds": 0.1}, timeout_s=0.05), targets.Hanging, processes=0)
        assert any("no call was answered" in reason for reason in result.void)

    async def test_calls_that_were_never_sent_are_told(self, monkeypatch):
        monkeypatch.setattr(client, "IN_FLIGHT_MAX", 10)
        monkeypatch.setattr(client, "GRACE_S", 0.0)
        result = await drive(scenario({"rate": 200.0}, timeout_s=0.1), targets.Hanging, processes=0)
        assert any("never sent" in reason for reason in result.void)
        assert len(result.ledger.rows) == 10


class TestAnswers:
    async def test_refusals_are_counted_by_their_reason(self):
        result = await drive(scenario({"callers": 1, "seconds": 0.2}), targets.Refusing, processes=0)
        phase = result.figures()["phases"][0]
        assert phase["rejects"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": phase["statuses"]["RESOURCE_EXHAUSTED"]}
        assert phase["retry_after_ms"]["p50"] == 25.0
        assert phase["failed_share"] == pytest.approx(0.5, abs=0.05)

    async def test_a_target_that_hangs_is_given_up_and_counted(self, monkeypatch):
        monkeypatch.setattr(client, "GRACE_S", 0.05)
        result = await drive(scenario({"rate": 50.0, "seconds": 0.2}, timeout_s=0.1), targets.Hanging, processes=0)
        phase = result.figures()["phases"][0]
        assert phase["rejects"] == {"DEADLINE_EXCEEDED NO_ANSWER": phase["scheduled"]}

    async def test_an_answer_after_the_deadline_is_no_answer(self):
        class Late(targets.Prompt):
            async def embed(self, texts, *, timeout_s):
                await asyncio.sleep(3 * timeout_s)
                return await super().embed(texts, timeout_s=timeout_s)

        result = await drive(scenario({"callers": 1, "seconds": 0.1}, timeout_s=0.02), Late, processes=0)
        assert set(result.figures()["phases"][0]["rejects"]) == {"DEADLINE_EXCEEDED LATE_ANSWER"}

    @pytest.mark.parametrize("load", [{"rate": 50.0}, {"callers": 2}])
    async def test_a_target_that_raises_ends_the_run(self, load):
        with pytest.raises(RuntimeError, match="a fault of the target"):
            await drive(scenario(load), targets.Broken, processes=0)


class TestProcesses:
    async def test_share_one_schedule_and_are_merged(self):
        asked = scenario({"rate": 200.0}, {"callers": 3})
        started = []
        result = await drive(asked, targets.Prompt, processes=2, on_start=lambda: started.append(1))
        rows = result.ledger.rows
        opened = rows[rows["phase"] == 0]
        # Each call of the one schedule was sent by exactly one of the two.
        assert np.sort(opened["meant"]).tolist() == arrivals(result.spans, asked.seed).tolist()
        assert (np.diff(rows["ended"]) >= 0).all()
        assert [use.calls > 0 for use in result.clients] == [True, True]
        assert sum(use.calls for use in result.clients) == len(rows)
        assert all(use.cpu_s > 0 for use in result.clients)
        assert started == [1]

    async def test_one_that_cannot_connect_is_a_sentence(self):
        with pytest.raises(TargetFailed, match="nobody:1 cannot be reached"):
            await drive(scenario({"callers": 1}), targets.Absent, processes=1)

    async def test_what_cannot_travel_is_refused(self):
        with pytest.raises(ValueError, match="importable by a client process"):
            await drive(scenario({"callers": 1}), lambda: targets.Prompt(), processes=1)  # noqa: PLW0108 - a lambda it is
