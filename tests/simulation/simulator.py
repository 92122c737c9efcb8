"""A deterministic world around one scheduler: callers, a clock, a device with faults, and the driver between them.

Goal: whole stories (overload, a stall, a poison text) in milliseconds, replayable from a seed. Method: a heap of
events on a clock of its own; nothing here reads a real clock or an unseeded generator. The driver does what an engine
does: expire, dispatch into a free slot, sleep until ``wake_at``, cancel whose deadline passed while running, report
every sojourn, and when the scheduler finds the device suspect, run a canary pass of its own on it.
"""

from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

from embedserve.scheduling.item import (
    Admitted,
    Batch,
    Failed,
    Fatal,
    OutOfMemory,
    Settled,
    Submission,
    Succeeded,
    Verdict,
)
from embedserve.scheduling.scheduler import Scheduler
from tests.simulation.checkers import CheckedScheduler
from tests.simulation.workloads import MS, SCENARIOS, Request, Scenario


@dataclass
class Story:
    """What became of one request."""

    request: Request
    id: int
    arrived_ns: int
    outcome: str = "open"  # refused, done, timed_out, cancelled, failed
    ended_ns: int = 0
    left: int = 0
    verdicts: Counter = field(default_factory=Counter)
    batches_before: int = 0
    """Batches that had been dispatched when it arrived."""
    batch_of: dict[int, int] = field(default_factory=dict)

    @property
    def sojourn_ns(self):
        return self.ended_ns - self.arrived_ns


@dataclass
class Running:
    batch: Batch
    elapsed_ns: int
    outcome: object


class Simulator:
    """Runs a scenario to its end. ``slots`` 2 dispatches one batch ahead, as an engine with a prepared batch does.

    It does so at once, or with ``prepare_ahead_ns`` so long before the running one is predicted to end.
    """

    def __init__(
        self,
        seed: int,
        scenario: str | Scenario,
        *,
        slots: int = 1,
        prepare_ahead_ns: int | None = None,
        checked: bool = True,
        trace: bool = True,
    ):
        self.scenario = SCENARIOS[scenario] if isinstance(scenario, str) else scenario
        self.rng = Random(seed)
        make = CheckedScheduler if checked else Scheduler
        self.scheduler = make(self.scenario.settings, self.scenario.policies())
        self.checked = checked
        self.slots = slots
        self.prepare_ahead_ns = prepare_ahead_ns
        self.free_t = 0
        self.events: list[tuple[int, int, str, object]] = []
        self.seq = 0
        self.t = 0
        self.skew = 0
        self.stories: dict[int, Story] = {}
        self.flight: list[Running] = []
        self.batches = 0
        self.busy_ns = 0
        self.lines: list[str] | None = [] if trace else None
        self.wake_t: int | None = None
        self.dead = False
        self.canaries = 0
        self.canary_runs = False
        self.tokens_done = Counter()

    # -- world ---------------------------------------------------------------------------------------------------------

    @property
    def now(self):
        return self.t + self.skew

    def at(self, t, kind, payload=None):
        self.seq += 1
        heappush(self.events, (t, self.seq, kind, payload))

    def say(self, what):
        if self.lines is not None:
            self.lines.append(f"{self.now / MS:12.3f}ms  {what}")

    def run(self) -> "Simulator":
        for request in self.scenario.requests(self.rng):
            self.at(request.at_ns, "arrive", request)
        for at, by in self.scenario.jumps:
            self.at(at, "jump", by)
        device = self.scenario.device
        if device.dies_at_ns is not None:
            self.at(device.dies_at_ns, "die")
        if self.scenario.drain_at_ns is not None:
            self.at(self.scenario.drain_at_ns, "drain")
        while self.events:
            self.t, _, kind, payload = heappop(self.events)
            getattr(self, f"on_{kind}")(payload)
            self.drive()
        if self.checked:
            self.scheduler.finish(self.scenario.policies())
        return self

    def drive(self):
        for settled in self.scheduler.expire(self.now):
            self.settle(settled)
        if self.scheduler.suspect and not (self.flight or self.canary_runs or self.dead):
            self.canary_runs = True
            self.at(self.t + self.scenario.device.batch_ns, "canary", self.scheduler.suspect)
        while len(self.flight) < self.slots and not self.dead:
            if self.flight and self.prepare_ahead_ns is not None and self.t < self.free_t - self.prepare_ahead_ns:
                self.at(self.free_t - self.prepare_ahead_ns, "wake")
                break
            batch = self.scheduler.next_batch(self.now)
            if batch is None:
                break
            self.dispatch(batch)
        for settled in self.scheduler.expire(self.now):
            self.settle(settled)
        wake = self.scheduler.wake_at(self.now)
        if wake is not None and (self.wake_t is None or wake - self.skew < self.wake_t or self.wake_t <= self.t):
            self.wake_t = max(wake - self.skew, self.t)
            self.at(self.wake_t, "wake")

    # -- device --------------------------------------------------------------------------------------------------------

    def dispatch(self, batch):
        self.batches += 1
        device, rng = self.scenario.device, self.rng
        elapsed = int(
            (device.batch_ns + device.token_ns * batch.padded_tokens) * (1 + device.jitter * (rng.random() - 0.5))
        )
        if device.slow_share and rng.random() < device.slow_share:
            elapsed *= 2
        riders = [(self.stories[s.submission_id], i) for s in batch.slices for i in s.indexes]
        for story, i in riders:
            story.batch_of.setdefault(i, self.batches)
        bad = frozenset(
            row
            for row, (story, i) in enumerate(riders)
            if i in story.request.nan_always or (i in story.request.nan and batch.rows > 1)
        )
        outcome = Succeeded(elapsed, bad)
        if device.oom_above_tokens is not None and batch.padded_tokens > device.oom_above_tokens:
            outcome, elapsed = OutOfMemory(), elapsed // 10
        elif self.broken or any(i in story.request.poison for story, i in riders):
            outcome = Failed()
        stalls = device.stall_at_ns
        if stalls is not None and stalls <= self.t < stalls + 50 * MS:
            elapsed += device.stall_ns
            outcome = Succeeded(elapsed) if isinstance(outcome, Succeeded) else outcome
        what = ",".join(f"{s.submission_id}x{len(s.indexes)}" for s in batch.slices)
        if len(what) > 60:
            what = what[:60] + "..."
        self.say(
            f"batch {batch.id} rows={batch.rows} edge={batch.edge} tokens={batch.tokens}/{batch.padded_tokens} "
            f"attempt={batch.attempt} of {what}"
        )
        self.flight.append(Running(batch, elapsed, outcome))
        if len(self.flight) == 1:
            self.start()

    def start(self):
        batch = self.flight[0].batch
        cost = self.scheduler.inner.cost if self.checked else self.scheduler.cost
        self.free_t = self.t + cost.predict_ns(batch.padded_tokens)
        self.at(self.t + self.scenario.device.hand_over_ns + self.flight[0].elapsed_ns, "complete", self.flight[0])

    def on_complete(self, running):
        if self.dead:
            return
        assert self.flight[0] is running
        self.flight.pop(0)
        self.busy_ns += running.elapsed_ns
        settlement = self.scheduler.complete(running.batch.id, running.outcome, self.now)
        kind = type(running.outcome).__name__
        if kind != "Succeeded" or running.outcome.non_finite:
            self.say(f"batch {running.batch.id} {kind} requeued={settlement.requeued}")
        for settled in settlement.settled:
            self.settle(settled)
        if settlement.fatal is not None:
            self.die(settlement.fatal)
        if self.flight:
            self.start()

    @property
    def broken(self):
        since = self.scenario.device.broken_from_ns
        return since is not None and self.t >= since

    def on_canary(self, why):
        """The worker ran token ids that are known to be good."""
        self.canaries += 1
        self.canary_runs = False
        self.say(f"canary {'failed' if self.broken else 'good'}: {why}")
        if not self.broken:
            self.scheduler.acquit(self.now)
            return
        for settled in self.scheduler.fail(why):
            self.settle(settled)
        self.die(why)

    def on_die(self, _):
        if self.flight:
            settlement = self.scheduler.complete(self.flight[0].batch.id, Fatal("device lost"), self.now)
            for settled in settlement.settled:
                self.settle(settled)
            self.die(settlement.fatal)
        elif not self.dead:
            self.at(self.t + MS, "die")  # a device that is idle is found dead by its next pass

    def die(self, why):
        self.say(f"fatal {why}")
        self.dead = True
        self.flight.clear()

    # -- callers -------------------------------------------------------------------------------------------------------

    def on_arrive(self, request: Request):
        number = len(self.stories) + 1
        story = self.stories[number] = Story(request, number, self.now, left=len(request.tokens))
        story.batches_before = self.batches
        deadline = None if request.patience_ns is None else self.now + request.patience_ns
        total = sum(request.tokens)
        refused = self.scheduler.judge(
            total,
            len(request.tokens),
            deadline_ns=deadline,
            priority=request.priority,
            tenant=request.tenant,
            now_ns=self.now,
        )
        if refused is None:
            answer = self.scheduler.submit(
                Submission(number, number, request.tokens, self.now, deadline, request.priority, request.tenant),
                self.now,
            )
            refused = None if isinstance(answer, Admitted) else answer
        if refused is not None:
            story.outcome, story.ended_ns = f"refused {refused.policy}", self.now
            self.say(f"refuse {number} {refused.policy} {refused.reason} retry={refused.retry_after_ms}")
            return
        self.say(
            f"admit {number} items={len(request.tokens)} tokens={total} wait={answer.predicted_wait_ns / MS:.3f}ms"
        )
        if deadline is not None:
            self.at(self.t + request.patience_ns, "deadline", story)
        if request.cancel_after_ns is not None:
            self.at(self.t + request.cancel_after_ns, "cancel", story)

    def on_cancel(self, story):
        if story.outcome == "open":
            left = self.scheduler.cancel(story.id, self.now)
            story.outcome, story.ended_ns = "cancelled", self.now
            self.say(f"cancel {story.id} left={left}")

    def on_deadline(self, story):
        """The engine gives the answer up at the deadline, even when it is being computed."""
        for settled in self.scheduler.expire(self.now):
            self.settle(settled)
        if story.outcome == "open":
            self.scheduler.cancel(story.id, self.now)
            self.end(story, "timed_out")

    def settle(self, settled: Settled):
        story = self.stories[settled.submission_id]
        story.verdicts[settled.verdict] += len(settled.indexes)
        story.left -= len(settled.indexes)
        if settled.verdict is Verdict.DONE:
            self.tokens_done[self.now // (100 * MS)] += sum(story.request.tokens[i] for i in settled.indexes)
        elif settled.verdict is not Verdict.EXPIRED:
            self.say(f"settle {settled.submission_id} {settled.verdict.value} {list(settled.indexes)[:6]}")
        if story.outcome == "open" and not story.left:
            late = Verdict.EXPIRED in story.verdicts
            self.end(story, "timed_out" if late else "failed" if Verdict.ENGINE_FAILED in story.verdicts else "done")

    def end(self, story, outcome):
        story.outcome, story.ended_ns = outcome, self.now
        if outcome in {"done", "timed_out"}:
            self.scheduler.observe_sojourn(story.sojourn_ns, self.now, timed_out=outcome == "timed_out")
        self.say(f"{outcome} {story.id} after {story.sojourn_ns / MS:.3f}ms")

    def on_wake(self, _):
        pass

    def on_jump(self, by):
        self.skew += by
        self.wake_t = None
        if self.flight and isinstance(self.flight[0].outcome, Succeeded):
            # The worker was stopped, too, and reads the same clock.
            running = self.flight[0]
            running.outcome = running.outcome._replace(elapsed_ns=running.outcome.elapsed_ns + by)
        self.say(f"clock goes on by {by / MS:.0f}ms")

    def on_drain(self, _):
        self.scheduler.drain()
        self.say("drain")

    # -- results -------------------------------------------------------------------------------------------------------

    def outcomes(self) -> Counter:
        return Counter(story.outcome for story in self.stories.values())

    def named(self, name) -> list[Story]:
        return [story for story in self.stories.values() if story.request.name == name]
