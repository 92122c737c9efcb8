"""A verdict on every invariant of the scheduler.

``CheckedScheduler`` stands in front of a ``Scheduler``, passes every call on, and keeps the plainest possible model
of what must be true: one record for each item, lists that are scanned. It knows nothing of flows' tags, runs, heaps
or ladders.
"""

from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush

from embedserve.scheduling.item import (
    Admitted,
    Batch,
    Fatal,
    Outcome,
    Priority,
    Rejection,
    Settled,
    Settlement,
    Shape,
    Submission,
    Succeeded,
    Verdict,
)
from embedserve.scheduling.scheduler import Scheduler
from embedserve.scheduling.settings import SchedulerSettings

INVARIANTS = {
    "I1": "each item settles exactly once",
    "I2": "no batch over max_batch_tokens or max_batch_items",
    "I3": "the queue stays within its limits and its counts are true",
    "I4": "no item in two live batches",
    "I5": "nothing is dispatched after its deadline",
    "I6": "no starvation",
    "I7": "nothing cancelled is dispatched",
    "I8": "work-conserving",
    "I9": "a drain admits nothing and ends",
    "I10": "same calls, same answers",
    "I11": "retries of one item <= ceil(log2(batch)) + 1",
    "I12": "a suspect device gets no work until it is acquitted",
}


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass
class Item:
    submission: Submission
    index: int
    state: str = "waiting"  # waiting, running, expired (found and not yet reported), settled, cancelled
    passes: int = 0
    first_rows: int = 0
    first_at: int | None = None

    @property
    def tokens(self):
        return self.submission.tokens[self.index]


@dataclass
class Patience:
    """Until which batch an overdue submission must have been dispatched in full."""

    since: int
    tokens: int
    flows: int


class CheckedScheduler:
    """A scheduler under watch. ``checks`` counts what was checked, by invariant; the first violation raises."""

    MANY = 500
    """Active items from which only every 50th call is scanned for."""

    def __init__(self, settings: SchedulerSettings, policies=()):
        self.inner = Scheduler(settings, policies)
        self.settings = settings
        self.items: dict[tuple[int, int], Item] = {}
        self.active: dict[tuple[int, int], Item] = {}
        self.late: list[Item] = []
        self.deadlines: list[tuple[int, tuple[int, int]]] = []
        self.calls = 0
        self.live: dict[int, tuple[Batch, list[Item]]] = {}
        self.checks = Counter(dict.fromkeys(INVARIANTS, 0))
        self.log: list[tuple[str, tuple, object]] = []
        self.batches = 0
        self.patience: dict[int, Patience] = {}
        self.draining = False

    def check(self, name, holds, why=""):
        self.checks[name] += 1
        if not holds:
            raise Violation(f"{name}: {INVARIANTS[name]}: {why}")

    def _call(self, name, *args, **kwargs):
        answer = getattr(self.inner, name)(*args, **kwargs)
        self.log.append((name, (args, tuple(sorted(kwargs.items()))), answer))
        return answer

    def in_state(self, *states):
        return [item for item in self.active.values() if item.state in states]

    # -- calls ---------------------------------------------------------------------------------------------------------

    def judge(self, tokens, items, **kwargs):
        return self._call("judge", tokens, items, **kwargs)

    def observe_sojourn(self, sojourn_ns, now_ns, *, timed_out):
        return self._call("observe_sojourn", sojourn_ns, now_ns, timed_out=timed_out)

    def submit(self, submission, now_ns) -> Admitted | Rejection:
        answer = self._call("submit", submission, now_ns)
        if isinstance(answer, Admitted):
            self.check("I9", not self.draining or submission.continuation, "admitted while draining")
            for i in range(len(submission.tokens)):
                self.items[submission.id, i] = self.active[submission.id, i] = Item(submission, i)
                if submission.deadline_ns is not None:
                    heappush(self.deadlines, (submission.deadline_ns, (submission.id, i)))
        self._counts()
        return answer

    def cancel(self, submission_id, now_ns):
        left = self._call("cancel", submission_id, now_ns)
        mine = []
        while (item := self.items.get((submission_id, len(mine)))) is not None:
            mine.append(item)
        mine = [x for x in mine if (submission_id, x.index) in self.active]
        waiting = sum(x.state == "waiting" for x in mine)
        self.check("I7", left == waiting, f"{left} items left the queue, {waiting} waited")
        for item in mine:
            item.state = "cancelled"
            del self.active[item.submission.id, item.index]
        self._counts()
        return left

    def expire(self, now_ns):
        settled = self._call("expire", now_ns)
        self.late = [x for x in self.late if x.state == "expired"]
        for s in settled:
            self.check("I1", s.verdict is Verdict.EXPIRED, "expire settled something else")
            for item in self._settle(s, "waiting", "expired"):
                self.check("I5", item.submission.deadline_ns <= now_ns, "expired too early")
        late = self._late(now_ns) + [x for x in self.late if x.state == "expired"]
        self.check("I5", not late, f"{len(late)} items outlive their deadline in the queue")
        self._counts()
        return settled

    def next_batch(self, now_ns) -> Batch | None:
        batch = self._call("next_batch", now_ns)
        self._note_expired(now_ns)
        self.check("I12", batch is None or self.inner.suspect is None, "a batch came")
        if batch is None:
            self._nothing_due(self.in_state("waiting"), now_ns)
            return None
        self.batches += 1
        items = []
        for s in batch.slices:
            self.check("I2", list(s.indexes) == sorted(set(s.indexes)), "indexes do not ascend")
            items += [self.items[s.submission_id, i] for i in s.indexes]
        for item in items:
            self.check("I7", item.state != "cancelled", f"item {item.index}")
            self.check("I4", item.state == "waiting", f"dispatched while {item.state}")
            deadline = item.submission.deadline_ns
            self.check("I5", deadline is None or now_ns < deadline, f"dispatched {now_ns}, deadline {deadline}")
            if not item.passes:
                item.first_rows = len(items)
                item.first_at = self.batches
            self.check("I11", item.passes <= (item.first_rows - 1).bit_length() + 1, f"{item.passes} retries")
            item.passes += 1
            item.state = "running"
        self._shape(batch, items)
        self.live[batch.id] = batch, items
        if len(self.active) <= self.MANY or not self.batches % 10:
            self._starvation(now_ns)
        return batch

    def complete(self, batch_id, outcome: Outcome, now_ns) -> Settlement:
        _, items = self.live.pop(batch_id)
        settlement = self._call("complete", batch_id, outcome, now_ns)
        fatal = settlement.fatal is not None
        row_of = {(x.submission.id, x.index): row for row, x in enumerate(items)}
        for s in settlement.settled:
            done = s.verdict is Verdict.DONE
            self.check("I1", len(s.rows) == (len(s.indexes) if done else 0), "rows and indexes differ")
            for item in self._settle(s, *(("waiting", "running") if fatal else ("running",))):
                key = item.submission.id, item.index
                if s.verdict is not Verdict.ENGINE_FAILED:
                    self.check("I1", key in row_of, "settled by a batch that it was not in")
                if done:
                    self.check("I1", isinstance(outcome, Succeeded), "done by a batch that failed")
                    self.check("I1", row_of[key] not in outcome.non_finite, "a row that is not finite was sent")
            if done:
                rows = tuple(row_of[s.submission_id, i] for i in s.indexes)
                self.check("I1", rows == s.rows, f"rows {s.rows} should be {rows}")
        back = [x for x in items if x.state == "running"]
        if not fatal:
            self.check("I1", settlement.requeued == len(back), "an item of a batch is neither settled nor back")
        for item in back:
            item.state = "waiting"
        if fatal:
            self.live.clear()
            self.check("I1", not self.in_state("waiting", "running"), "an item survives the device")
        if isinstance(outcome, Fatal):
            self.check("I1", fatal, "a fatal outcome was not")
        self._counts()
        return settlement

    def acquit(self, now_ns):
        self._call("acquit", now_ns)
        self.check("I12", self.inner.suspect is None, "still suspect")

    def fail(self, why):
        """The driver gives the device up: everybody who waits or runs is told."""
        settled = self._call("fail", why)
        for s in settled:
            self.check("I1", s.verdict is Verdict.ENGINE_FAILED, "fail settled something else")
            self._settle(s, "waiting", "running")
        self.live.clear()
        self.check("I1", not self.in_state("waiting", "running"), "an item survives the device")
        self._counts()
        return settled

    @property
    def suspect(self):
        return self.inner.suspect

    def drain(self):
        self.draining = True
        self._call("drain")

    def wake_at(self, now_ns):
        wake = self._call("wake_at", now_ns)
        self._note_expired(now_ns)
        if any(x.state == "expired" for x in self.late):
            self.check("I8", wake == now_ns, "has expiries to report and sleeps")
        if len(self.active) <= self.MANY or not self.calls % 50:
            waits = [x.submission.deadline_ns for x in self.in_state("waiting") if x.submission.deadline_ns is not None]
            if waits:
                self.check("I8", wake is not None and wake <= max(min(waits), now_ns), "sleeps through a deadline")
        self.check("I8", wake is None or wake >= now_ns, "wakes in the past")
        return wake

    def load(self, now_ns):
        return self._call("load", now_ns)

    # -- checks --------------------------------------------------------------------------------------------------------

    def finish(self, policies=()):
        """At the end, with nothing in flight: all items are settled, and a replay gives the same answers."""
        self.check("I1", not self.in_state("waiting", "running", "expired"), "items are left at the end")
        self.check("I9", self.inner.depth.waiting_items == 0, "the queue is not empty at the end")
        again = Scheduler(self.settings, policies)
        for name, (args, kwargs), answer in self.log:
            self.check("I10", repr(getattr(again, name)(*args, **dict(kwargs))) == repr(answer), name)

    def _note_expired(self, now_ns):
        """What is late leaves the queue when it is met, and is reported by the next ``expire``."""
        for item in self._late(now_ns):
            item.state = "expired"
            self.late.append(item)

    def _late(self, now_ns):
        """Items in the queue whose deadline has come; a running one may come back to it."""
        late = []
        while self.deadlines and self.deadlines[0][0] <= now_ns:
            item = self.items[heappop(self.deadlines)[1]]
            if item.state == "waiting":
                late.append(item)
        return late

    def _settle(self, settled: Settled, *states):
        items = [self.items[settled.submission_id, i] for i in settled.indexes]
        for item in items:
            self.check("I1", item.state in states, f"an item that is {item.state} settled as {settled.verdict}")
            item.state = "settled"
            del self.active[item.submission.id, item.index]
        return items

    def _nothing_due(self, waiting, now_ns):
        due = [x for x in waiting if x.submission.deadline_ns is None or now_ns < x.submission.deadline_ns]
        if not due or self.inner.fatal is not None or self.inner.suspect is not None:
            self.checks["I8"] += 1
            return
        ends = min(x.submission.arrived_ns for x in due) + self.settings.max_queue_delay_ns
        held = not self.draining and now_ns < ends and all(not x.passes for x in due)
        self.check("I8", held, f"{len(due)} items wait and no batch came")

    def _edge(self, tokens):
        return next(edge for edge in self.settings.bucket_edges if tokens <= edge)

    def _shape(self, batch: Batch, items):
        s, lengths = self.settings, [x.tokens for x in items]
        self.check("I2", 1 <= len(items) == batch.rows <= s.max_batch_items, f"{batch.rows} rows")
        self.check("I2", batch.padded_tokens <= s.max_batch_tokens, f"{batch.padded_tokens} tokens")
        self.check("I2", batch.tokens == sum(lengths), "useful tokens")
        self.check("I2", batch.oldest_ns == min(x.submission.arrived_ns for x in items), "oldest")
        if s.shape is Shape.BUCKETED:
            self.check("I2", {self._edge(n) for n in lengths} == {batch.edge}, "buckets mixed")
            rows = batch.rows if not s.batch_sizes else batch.padded_tokens // batch.edge
            self.check("I2", batch.padded_tokens == rows * batch.edge and rows >= batch.rows, "padded tokens")
        else:
            self.check("I2", (batch.edge, batch.padded_tokens) == (max(lengths), sum(lengths)), "packed size")

    def _counts(self):
        self.calls += 1
        if len(self.active) > self.MANY and self.calls % 50:
            return  # a scan of everything at each call would take the test minutes
        depth, s = self.inner.depth, self.settings
        waiting, running = self.in_state("waiting"), [x for _, items in self.live.values() for x in items]
        self.check("I3", depth.waiting_items == len(waiting), f"{depth.waiting_items} for {len(waiting)} waiting")
        self.check("I3", depth.waiting_tokens == sum(x.tokens for x in waiting), "waiting tokens")
        self.check("I3", depth.running_items == len(running), f"{depth.running_items} for {len(running)} running")
        self.check("I3", depth.running_tokens == sum(x.tokens for x in running), "running tokens")
        by_bucket = Counter(self._edge(x.tokens) for x in waiting)
        self.check("I3", depth.waiting_by_bucket == {e: by_bucket[e] for e in s.bucket_edges}, "by bucket")
        oldest = min((x.submission.arrived_ns for x in waiting), default=None)
        self.check("I3", depth.oldest_arrived_ns == oldest, "oldest arrival")
        self.check("I3", len(waiting) + len(running) <= s.max_queue_items, "items over the limit")
        self.check("I3", sum(x.tokens for x in waiting + running) <= s.max_queue_tokens, "tokens over the limit")

    def _starvation(self, now_ns):
        """A submission that is overdue leaves within a number of batches that is known then.

        Its flow gets a turn at least each time all other flows had one, and needs a turn for each item at most; the
        lowest class gets its share of batches only; each bucket may need batches of its own.
        """
        waiting: dict[int, list[Item]] = {}
        of_flow = Counter()
        for item in self.in_state("waiting"):
            if not item.passes:
                waiting.setdefault(item.submission.id, []).append(item)
                of_flow[item.submission.tenant, item.submission.flow] += 1
        lanes = len(self.settings.bucket_edges) if self.settings.shape is Shape.BUCKETED else 1
        for sid, items in waiting.items():
            first = items[0].submission
            if now_ns - first.arrived_ns <= self.settings.max_wait_ns:
                continue
            held = self.patience.get(sid)
            if held is None:
                # Earlier arrivals of the flow go first; counting all of its items is looser and still a bound.
                own = of_flow[first.tenant, first.flow]
                held = self.patience[sid] = Patience(self.batches, own, len(of_flow))
            held.flows = max(held.flows, len(of_flow))
            turns = held.tokens + 1
            share = 1 if first.priority is Priority.INTERACTIVE else 2 / self.settings.lowest_class_share
            bound = held.since + (turns * (held.flows + 1) + 2) * lanes * share
            self.check("I6", self.batches <= bound, f"submission {sid} waits since batch {held.since}")
