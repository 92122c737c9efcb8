"""Every item that was admitted is counted once, however its end and its deadline meet."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from embedserve.engine.driver import Driver
from embedserve.engine.pending import WholeRequest
from embedserve.engine.worker import Pass, PassResult
from embedserve.errors import DeadlineExpired
from embedserve.model.backend import PassTimes
from embedserve.scheduling.item import Submission, Succeeded
from embedserve.scheduling.scheduler import Scheduler
from embedserve.scheduling.settings import SchedulerSettings
from tests.integration.engine.conftest import RecordingObserver, call

MS = 1_000_000


class Unwatched:
    """A watchdog that is asleep."""

    def begun(self, now_ns: int, predicted_ns: int) -> None: ...

    def ended(self, now_ns: int) -> None: ...

    def stop(self) -> None: ...


def succeeded(ran: Pass) -> PassResult:
    now = time.monotonic_ns()
    times = PassTimes(now - MS, now, now, now, now, now)
    return PassResult(ran.batch_id, Succeeded(MS), np.ones((ran.rows, 4), dtype=np.float32), times, None, None)


class TestStoppedProcess:
    """SIGSTOP and SIGCONT: a pass has ended and a deadline has come, and the loop sees both at once."""

    @pytest.mark.parametrize(("items", "in_flight"), [(3, 1), (5, 2)], ids=["one waits", "another pass runs"])
    async def test_items_of_a_pass_that_ended_beside_the_deadline_are_counted_once(
        self, items: int, in_flight: int
    ) -> None:
        observer, ran = RecordingObserver(), list[Pass]()
        driver = Driver(
            Scheduler(SchedulerSettings(max_batch_items=2)),
            ran.append,
            observer,
            Unwatched(),
            batches_in_flight=in_flight,
            prepare_ahead_ns=lambda _: 10_000 * MS,
            judge_probe=lambda _vector: None,
            on_fatal=pytest.fail,
        )
        answer = asyncio.get_running_loop().create_future()
        deadline = time.monotonic_ns() + 50 * MS
        asked = call(*["hello"] * items, deadline_ns=deadline)
        submission = Submission(1, 1, [3] * items, time.monotonic_ns(), deadline_ns=deadline)
        ids = np.ones(3 * items, dtype=np.int32)
        assert driver.submit(WholeRequest(submission, asked, ids, np.zeros(items, dtype=np.bool_), 0, answer)) is None
        await asyncio.sleep(0)  # one turn of the loop, and the device has its passes
        assert len(ran) == in_flight
        time.sleep(max(0, deadline - time.monotonic_ns()) / 1e9)  # noqa: ASYNC251 - the loop stands still: the fault
        for done in list(ran):
            driver.take_result(succeeded(done))

        assert sum(observer.verdicts.values()) == items, observer.verdicts
        assert driver.idle
        with pytest.raises(DeadlineExpired):
            await answer
