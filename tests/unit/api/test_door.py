"""What the door tells a caller whom it turns away, and of whom it asks."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from embedserve.api import status
from embedserve.api.door import KEPT_NS, Door
from embedserve.api.rpc import Rpc
from embedserve.engine.intake import overloaded
from embedserve.scheduling.item import Priority, Rejection

MS = 1_000_000
S = 1_000_000_000
FULL = Rejection("queue", "QUEUE_FULL", 1_000, {"queued_items": 4.0})
SLOW = Rejection("throughput", "DRAIN_TIME_EXCEEDED", 500, {"drain_ns": 3e9})


class Unread:
    """Stands for the engine's: refuses all with what it is given."""

    def __init__(self) -> None:
        self.says: Rejection | None = FULL
        self.able = True
        self.asked: list[tuple[Any, ...]] = []

    def watched(self, now_ns: int) -> bool:
        return True

    def judges(self, deadline_ns: int | None, priority: Priority, now_ns: int) -> bool:
        return self.able

    def judge(self, *question: Any) -> Rejection | None:
        self.asked.append(question)
        return self.says


@pytest.fixture
def unread() -> Unread:
    return Unread()


@pytest.fixture
def door(unread: Unread) -> Door:
    return Door(unread, max_request_ms=60_000, max_tenant_bytes=64)  # type: ignore[arg-type]


def rpc(*metadata: tuple[str, str], arrived_ns: int = 0) -> Rpc:
    return Rpc("embedserve.v1.EmbeddingService/Embed", metadata, arrived_ns)


def told(reply: status.Reply | None) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    """ErrorInfo, and milliseconds of RetryInfo."""
    assert reply is not None
    details = status_pb2.Status.FromString(dict(reply.trailers)["grpc-status-details-bin"])
    info, retry, wait_ms = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), None
    for detail in details.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            wait_ms = retry.retry_delay.ToNanoseconds() / 1e6
    assert (details.code, details.message) == (reply.code.value[0], reply.message)
    return info, wait_ms


class TestReply:
    """The same words as to a call that was read."""

    @pytest.mark.parametrize(
        "rejection",
        [
            FULL,
            SLOW,
            Rejection("latency_p95", "P95_EXCEEDED", 20, {"shed_share": 0.25}),
            Rejection("deadline", "DEADLINE_PASSED", None),
        ],
    )
    def test_it_is_an_ordinary_refusal(self, door: Door, unread: Unread, rejection: Rejection) -> None:
        unread.says = rejection
        reply = door.refusal(rpc(), None, 0)
        ordinary = status.reply(overloaded(rejection))

        assert reply is not None
        assert reply._replace(trailers=()) == ordinary._replace(trailers=())
        assert dict(reply.trailers).keys() == dict(ordinary.trailers).keys()
        assert told(reply)[0] == told(ordinary)[0]
        assert reply.code is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_those_refused_together_do_not_come_back_together(self, door: Door) -> None:
        """The sentence is kept; when to come back is each call's own, and the same in both places."""
        waits = set()
        for _ in range(50):
            reply = door.refusal(rpc(), None, 0)
            _, wait_ms = told(reply)
            assert reply is not None
            assert wait_ms is not None
            assert dict(reply.trailers)["grpc-retry-pushback-ms"] == str(round(wait_ms))
            waits.add(wait_ms)

        assert len(waits) > 25
        assert 800 <= min(waits) < 900 < 1_100 < max(waits) <= 1_200

    def test_the_wait_is_that_of_this_refusal(self, door: Door, unread: Unread) -> None:
        door.refusal(rpc(), None, 0)
        unread.says = FULL._replace(retry_after_ms=10)

        wait_ms = told(door.refusal(rpc(), None, 1))[1]
        assert wait_ms is not None
        assert 8 <= wait_ms <= 12

    def test_a_retry_past_the_callers_deadline_is_not_asked_for(self, door: Door) -> None:
        early, late = door.refusal(rpc(), 300 * MS, 0), door.refusal(rpc(), 2 * S, 0)

        assert early is not None
        assert late is not None
        assert dict(early.trailers)["grpc-retry-pushback-ms"] == "-1"
        assert int(dict(late.trailers)["grpc-retry-pushback-ms"]) > 0

    def test_what_is_traced_and_measured(self, door: Door) -> None:
        call = rpc(("x-embedserve-priority", "bulk"), ("x-embedserve-tenant", "blue"))
        door.refusal(call, None, 0)

        assert call.attributes == {"queued_items": 4.0, "policy": "queue", "priority": "bulk", "tenant": "blue"}


class TestQuestion:
    """Each call is judged by its own headers and time."""

    def test_priority_tenant_arrival_and_deadline(self, door: Door, unread: Unread) -> None:
        door.refusal(rpc(("x-embedserve-priority", "interactive"), arrived_ns=3), 9 * S, 5)
        door.refusal(rpc(("x-embedserve-tenant", "blue"), arrived_ns=4), None, 6)
        door.refusal(rpc(arrived_ns=5), 900 * S, 7)

        assert unread.asked == [
            (3, 9 * S, Priority.INTERACTIVE, "", 5),
            (4, 4 + 60 * S, Priority.DEFAULT, "blue", 6),  # the server's own maximum
            (5, 5 + 60 * S, Priority.DEFAULT, "", 7),
        ]

    @pytest.mark.parametrize(
        "header", [("x-embedserve-priority", "urgent"), ("x-embedserve-tenant", "x" * 65), ("x-embedserve-tenant", "ä")]
    )
    def test_wrong_headers_are_let_through_to_be_told_so(
        self, door: Door, unread: Unread, header: tuple[str, str]
    ) -> None:
        call = rpc(header)

        assert door.refusal(call, None, 0) is None
        assert not unread.asked
        assert not call.judged_unread

    def test_who_was_not_judged_has_still_to_be(self, door: Door, unread: Unread) -> None:
        """Where chance has a part, its lot is drawn when the call is read."""
        unread.able = False
        call = rpc()

        assert door.refusal(call, None, 0) is None
        assert not unread.asked
        assert not call.judged_unread

    def test_who_is_let_through_has_been_judged(self, door: Door, unread: Unread) -> None:
        unread.says = None
        call = rpc()

        assert door.refusal(call, None, 0) is None
        assert call.judged_unread
        assert call.attributes == {}


class TestGuess:
    def test_nobody_is_told_a_size_that_is_not_his(self, door: Door, unread: Unread) -> None:
        """He was not read: what he was judged by is a guess."""
        unread.says = Rejection("throughput", "DRAIN_TIME_EXCEEDED", 5, {"drain_ns": 3e9, "tokens": 7.0, "items": 1.0})
        call = rpc()
        reply = door.refusal(call, None, 0)
        info, _ = told(reply)

        assert reply is not None
        assert "tokens" not in reply.message
        assert dict(info.metadata) == {"policy": "throughput", "drain_ns": "3e+09"}
        assert call.attributes.keys().isdisjoint({"tokens", "items"})


class TestKeptSentence:
    """Made once in ``KEPT_NS`` for each reason."""

    def message(self, door: Door, unread: Unread, items: float, now_ns: int) -> str:
        unread.says = FULL._replace(figures={"queued_items": items})
        reply = door.refusal(rpc(), None, now_ns)
        assert reply is not None
        assert told(reply)[0].metadata["queued_items"] == reply.message.partition("queued_items=")[2].rstrip(")")
        return reply.message

    def test_its_figures_are_so_old_at_most(self, door: Door, unread: Unread) -> None:
        first = self.message(door, unread, 4, 7)

        assert self.message(door, unread, 5, 7 + KEPT_NS) == first
        assert "queued_items=6" in self.message(door, unread, 6, 8 + KEPT_NS)
        assert "queued_items=6" in self.message(door, unread, 7, 8 + 2 * KEPT_NS)
        assert KEPT_NS == 100 * MS

    def test_reasons_are_not_mixed_up(self, door: Door, unread: Unread) -> None:
        for rejection in (FULL, SLOW, FULL._replace(policy="other"), FULL._replace(reason="OTHER"), FULL, SLOW):
            unread.says = rejection
            info, _ = told(door.refusal(rpc(), None, 0))

            assert (info.reason, info.metadata["policy"]) == (rejection.reason, rejection.policy)

    @pytest.mark.parametrize("reason", ["DEADLINE_UNREACHABLE", "DEADLINE_TOO_SHORT"])
    def test_nobody_is_told_how_much_time_another_had(self, door: Door, unread: Unread, reason: str) -> None:
        """Figures of that policy are one caller's own: they are in its span and its line, and in no kept sentence."""
        for left_ms in (30, 500):
            unread.says = Rejection("deadline", reason, 10, {"left_ns": left_ms * 1e6})
            call = rpc()
            reply = door.refusal(call, left_ms * MS, 0)
            info, _ = told(reply)

            assert reply is not None
            assert reply.message.endswith("by the call's own deadline")
            assert dict(info.metadata) == {"policy": "deadline"}
            assert call.attributes["left_ns"] == left_ms * 1e6

    def test_one_for_each_reason_and_no_more(self, door: Door, unread: Unread) -> None:
        """Whatever callers send: nothing of theirs is in the key."""
        for number in range(500):
            unread.says = SLOW if number % 2 else FULL
            door.refusal(rpc(("x-embedserve-tenant", f"tenant {number}")), number * S, number * MS)

        assert len(door._kept) == 2
