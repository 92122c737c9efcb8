"""When an answer is late, for every client alike."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.answer import DEADLINE_EXCEEDED, OK, RESOURCE_EXHAUSTED, Answer
from loadtest.caller import _row
from loadtest.client import Client, Job
from loadtest.deadline import is_late
from loadtest.native.volley import Ended
from loadtest.target import Reply
from tests.unit.loadtest import targets
from tests.unit.loadtest.scenarios import scenario


class TestIsLate:
    @pytest.mark.parametrize(("ended", "late"), [(3.4, False), (3.5, False), (3.6, True)])
    def test_counts_from_the_instant_of_sending(self, ended, late):
        assert is_late(2.5, ended, 1.0) is late

    def test_without_a_deadline_nothing_is(self):
        assert not is_late(0.0, 1e9, None)


def by_schedule(reply: Reply, ended: float) -> str:
    """What the client of a scenario notes of a call that was meant for 0 s and sent at 2 s with 1 s to answer."""
    asked = scenario({"callers": 1}, timeout_s=1.0)
    client = Client(Job(scenario=asked, make_target=targets.Prompt))
    client._note(0.0, 2.0, ended, 0, 1, reply)
    return client.scribe.ledger().outcomes[0][0]


def by_native(code: int, ended: float) -> int:
    """The same of ``caller.py`` with the client in C++."""
    answer = Answer()
    answer.code = code
    row = _row(Ended(0.0, 2.0, ended, 0, 0, answer, connected=True), 1.0)
    assert np.isnan(row[4])
    return row[3]


class TestLateAnswers:
    def test_count_as_expired(self):
        assert (by_schedule(Reply("OK"), 2.9), by_native(OK, 2.9)) == ("OK", OK)
        assert (by_schedule(Reply("OK"), 3.1), by_native(OK, 3.1)) == ("DEADLINE_EXCEEDED", DEADLINE_EXCEEDED)

    def test_a_late_refusal_stays_one(self):
        assert by_schedule(Reply("RESOURCE_EXHAUSTED"), 3.1) == "RESOURCE_EXHAUSTED"
        assert by_native(RESOURCE_EXHAUSTED, 3.1) == RESOURCE_EXHAUSTED
