"""What broke in coral-gpu-inference's batcher, each as a promise of ours; D3 to D14 number the defects."""

from embedserve.scheduling.admission.latency_p95 import LatencyP95Policy
from embedserve.scheduling.admission.throughput import ThroughputPolicy
from embedserve.scheduling.item import Admitted, Failed, Shape, Submission, Succeeded, Verdict
from embedserve.scheduling.settings import LatencyP95Settings, ThroughputSettings
from tests.unit.scheduling.making import MS, S, items, run_all, small_scheduler, submission


class TestCoralDefects:
    def test_d3_a_poison_request_leaves_nobody_waiting(self):
        """There, an error after the pop lost the batch: everybody in it waited to the deadline."""
        s = small_scheduler()
        for number in range(8):
            s.submit(submission(number, 8), 0)
        verdicts = {}
        while (batch := s.next_batch(0)) is not None:
            bad = (5, 0) in items(batch)
            for settled in s.complete(batch.id, Failed() if bad else Succeeded(1_000), 0).settled:
                verdicts[settled.submission_id] = settled.verdict

        assert verdicts == {n: Verdict.ITEM_ERROR if n == 5 else Verdict.DONE for n in range(8)}

    def test_d7_an_oversize_request_is_split(self):
        """There, 2,000 rows ran as one batch over a limit of 512, and nothing else ran for 8 s."""
        s = small_scheduler(max_queue_items=3_000, max_queue_tokens=100_000)
        s.submit(submission(1, *[8] * 2_000), 0)
        s.next_batch(0)
        s.submit(submission(2, 8), 0)
        second = s.next_batch(0)

        assert (2, 0) in items(second)
        assert all(b.rows <= 8 for b in run_all(s))

    def test_d8_abandoned_work_is_removed(self):
        """There, 139,264 tokens of 24 callers whose deadline had passed got the next caller refused."""
        s = small_scheduler(
            [ThroughputPolicy(ThroughputSettings(max_drain_ns=50 * MS))],
            initial_batch_ns=1 * MS,
            initial_token_ns=10_000,
        )
        for number in range(24):
            s.submit(Submission(number, number, (32,) * 4, 0, 50 * MS), 0)

        assert s.depth.waiting_tokens > 1_700  # the deadline admits no more

        s.expire(50 * MS)

        assert s.depth.waiting_tokens == 0
        assert isinstance(s.submit(Submission(99, 99, (8,), 50 * MS), 50 * MS), Admitted)
        assert items(s.next_batch(50 * MS)) == [(99, 0)]

    def test_d9_the_latency_policy_sees_timeouts(self):
        """There, 4,318 of 4,500 timed out, 162 were refused, and health said healthy."""
        slo = LatencyP95Settings(slo_ns=400 * MS, soft_ns=300 * MS, hard_ns=400 * MS)
        s = small_scheduler([LatencyP95Policy(slo)], initial_batch_ns=20 * MS, max_batch_items=1)
        for _ in range(100):
            s.observe_sojourn(500 * MS, 1 * S, timed_out=True)
        for number in range(16):
            s.submit(Submission(number, number, (8,), 1 * S, continuation=True), 1 * S)
        answers = [s.judge(8, 1, now_ns=1 * S) for _ in range(200)]
        refused = [a for a in answers if a is not None]

        assert len(refused) > 150
        assert {a.reason for a in refused} == {"P95_EXCEEDED"}
        assert all(a.retry_after_ms >= 1 for a in refused)

    def test_d11_the_rate_is_of_device_time(self):
        """There, hand-overs and bursts made 10-33k tokens/s of 10-12k, and a floor of 10k hid slow devices."""
        s = small_scheduler()
        now = 0
        for number in range(50):
            now += 1 * S  # idle in between
            s.submit(Submission(number, number, (8,) * 8, now), now)
            batch = s.next_batch(now)
            s.complete(batch.id, Succeeded(6_400 * MS), now + 9_000 * MS)  # hand-over takes time, too

        assert abs(s.load(now).tokens_per_second - 10) < 0.1

    def test_d12_long_texts_do_not_wait_for_all_short_ones(self):
        """There, short buckets were scanned first: p99 3.2 s at a p50 of 169 ms."""
        s = small_scheduler(shape=Shape.BUCKETED)
        for number in range(8):
            s.submit(submission(number, 8), 0)
        s.submit(submission(100, 32), 0)
        for round_ in range(50):
            batch = s.next_batch(round_ * MS)
            if (100, 0) in items(batch):
                break
            for number in range(8):  # the short bucket is full again before each batch
                s.submit(
                    Submission(1_000 + 8 * round_ + number, 1_000 + 8 * round_ + number, (8,), round_ * MS), round_ * MS
                )
        limit_rounds = 500 * MS // MS

        assert round_ < min(50, limit_rounds)

    def test_d12_after_its_wait_limit_a_long_text_is_next(self):
        """Whatever is full then."""
        s = small_scheduler(shape=Shape.BUCKETED, max_wait_ns=10 * MS)
        s.submit(submission(100, 32), 0)
        for number in range(64):
            s.submit(Submission(number, number, (8,), 1 * MS), 1 * MS)

        assert s.next_batch(9 * MS).edge == 8
        assert s.next_batch(11 * MS).edge == 32

    def test_d14_a_batch_is_popped_only_for_a_free_slot(self):
        """There, a full hand-over queue lost batches after they were popped: 30 of 40 requests expired."""
        s = small_scheduler()
        for number in range(40):
            s.submit(submission(number, 8), 0)
        first = s.next_batch(0)  # the one slot is taken: nothing else is asked for

        assert s.depth.waiting_items == 32

        done = list(s.complete(first.id, Succeeded(1_000), 0).settled)
        while (batch := s.next_batch(0)) is not None:
            done += s.complete(batch.id, Succeeded(1_000), 0).settled

        assert sorted(x.submission_id for x in done) == list(range(40))
