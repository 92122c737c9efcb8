"""Takes the snapshot that `/statusz` shows: recent facts, the engine's figures and the settings, put together.

Decides where each field comes from. Must never know how a snapshot is shown, and only reads: nothing that it asks
teaches a policy anything. A part of the composition root, as ``wiring.py`` is. Event loop only; a snapshot takes 1 to
3 ms.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from copy import copy

from embedserve import __version__
from embedserve.api.observer import CallObserver
from embedserve.config import Config
from embedserve.engine.engine import Engine
from embedserve.engine.load import ORDINARY_TOKENS
from embedserve.engine.observer import EngineObserver
from embedserve.lifecycle import Lifecycle, State
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.cores import core_count
from embedserve.part import Memories
from embedserve.policy_figures import policy_figures
from embedserve.scheduling.item import Depth, Rejection
from embedserve.snapshot import (
    Admission,
    Batches,
    Bucket,
    Change,
    Device,
    Figure,
    Model,
    Policy,
    Process,
    Requests,
    Resource,
    Sizes,
    Snapshot,
    Tokenizer,
    Traffic,
)
from embedserve.telemetry.ended_calls import SLOWEST, WINDOW_S, latency_of
from embedserve.telemetry.memory import Merged, merge_memories
from embedserve.telemetry.recent import NOW_S, Recent
from embedserve.telemetry.seconds import NS, RECENT_S, STEP_S, Slot
from embedserve.telemetry.watching import RecentCalls, RecentEngine
from embedserve.wiring import bucket_edges

__all__ = ["Status"]

CHANGES = 8
"""Steps of the lifecycle that are kept: a stall and its end are two."""


class Status:
    """What is known of this process, for people."""

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        lifecycle: Lifecycle,
        addresses: Callable[[], tuple[str, ...]],
        recall: Callable[[], Awaitable[Memories]] | None = None,
    ) -> None:
        """Begin to remember; ``addresses`` says where gRPC listens, ``recall`` asks the front ends where there are."""
        self._config = config
        self._checkpoint = checkpoint
        self._lifecycle = lifecycle
        self._addresses = addresses
        self._edges = bucket_edges(config, checkpoint)
        self._threads = config.tokenizer.thread_count(core_count())
        self._engine: Engine | None = None
        self._recall = recall
        self._merged: Merged | None = None
        self._memories: Memories | None = None
        self._changes = deque([Change(lifecycle.state.value, time.time())], maxlen=CHANGES)
        self._started_s = time.time()
        self.recent = Recent(self._threads)
        lifecycle.listen(self._changed)

    def watch(self, calls: CallObserver, engine: EngineObserver) -> tuple[CallObserver, EngineObserver]:
        """Observers that note what happens and pass all of it on to these."""
        return RecentCalls(self.recent, calls), RecentEngine(self.recent, engine)

    def attach(self, engine: Engine) -> None:
        """Ask ``engine`` from now on."""
        self._engine = engine

    async def take(self) -> Snapshot:
        """Everything, now, with what front ends remember where there are some. Only once an engine is attached."""
        if self._recall is None:
            return self.snapshot()
        memories = await self._recall()
        everywhere = copy(self)
        everywhere.see(memories)
        return everywhere.snapshot()

    def see(self, memories: Memories) -> None:
        """Answer from now on of what all processes remember: for a copy that is asked once."""
        assert self._engine is not None
        now = time.monotonic_ns()
        self.recent.settle()
        self.recent.update_full(now, self.recent.busy(now, self._engine.pass_age_ns))
        self._memories, self._merged = memories, merge_memories(self.recent, memories.given)
        self.recent = self._merged.recent
        self._threads = self.recent.threads

    def snapshot(self) -> Snapshot:
        """Everything, now, of this process alone. Only once an engine is attached."""
        engine = self._engine
        assert engine is not None
        scheduler, recent = engine.scheduler, self.recent
        now, wall_ns = time.monotonic_ns(), time.time_ns()
        offset = wall_ns - now
        recent.settle()
        busy = recent.busy(now, engine.pass_age_ns)
        recent.update_full(now, busy)
        depth, load = scheduler.depth, scheduler.load(now)
        latency, stages = recent.samples.stages(now)
        return Snapshot(
            at_s=wall_ns / NS,
            now_s=min(recent.seconds.length_s(NOW_S, now), NOW_S),
            window_s=WINDOW_S,
            recent_s=RECENT_S,
            step_s=STEP_S,
            process=self._process(now),
            model=self._model(engine),
            resources=self._resources(busy, now, offset, engine.pass_age_ns),
            traffic=self._traffic(now, offset),
            buckets=self._buckets(engine, depth, now),
            running_items=depth.running_items,
            running_tokens=depth.running_tokens,
            max_queue_items=int(scheduler.figures(now)["queue"]["max_queue_items"]),
            max_queue_tokens=int(scheduler.figures(now)["queue"]["max_queue_tokens"]),
            drain_s=load.drain_ns / NS,
            latency=latency,
            stages=stages,
            batches=self._batches(engine, now),
            admission=self._admission(engine, depth, now, offset),
            device=self._device(engine, now, offset),
            tokenizer=self._tokenizer(engine, now),
            requests=self._requests(now, offset),
        )

    def _changed(self, state: State) -> None:
        self._changes.append(Change(state.value, time.time()))

    def _process(self, now: int) -> Process:
        return Process(
            state=self._lifecycle.state.value,
            since_s=self._changes[-1].at_s,
            started_s=self._started_s,
            uptime_s=(now - self.recent.seconds.begun_ns) / NS,
            version=__version__,
            pid=os.getpid(),
            host=socket.gethostname(),
            addresses=self._addresses(),
            changes=tuple(self._changes),
            front_ends=tuple(name for name, _ in self._memories.given) if self._memories else (),
            silent=tuple(self._memories.silent) if self._memories else (),
        )

    def _model(self, engine: Engine) -> Model:
        checkpoint = self._checkpoint
        identity = engine.identity if engine.loaded else None
        return Model(
            name=checkpoint.name,
            revision=checkpoint.revision,
            weights_digest=checkpoint.weights_digest,
            tokenizer_digest=checkpoint.tokenizer_digest,
            architecture=checkpoint.architecture,
            pooling=identity.pooling if identity else None,
            dimension=identity.dimension if identity else None,
            max_input_length=checkpoint.max_input_length,
            dtype=identity.dtype if identity else None,
            device=identity.device if identity else None,
            compiled=engine.device.compiled if engine.loaded else None,
        )

    def _resources(self, busy: Mapping[str, float], now: int, offset: int, pass_age_ns: int) -> tuple[Resource, ...]:
        seconds = self.recent.seconds
        running = dict(_spread(now - pass_age_ns, now)) if pass_age_ns else {}
        device = seconds.history(lambda slot: slot.device_ns / NS, now, running)
        tokenizer = seconds.history(lambda slot: slot.tokenizer_ns / NS / self._threads, now)
        histories = {"device": device, "tokenizer": tokenizer, "event loop": seconds.loop_history(now)}
        found = []
        for name, share in busy.items():
            since = self.recent.full_since[name]
            history = tuple(None if point is None else min(point, 1.0) for point in histories[name])
            found.append(Resource(name, share, history, None if since is None else (since + offset) / NS))
        for loop in self._merged.loops if self._merged else ():
            full_s = None if loop.full_since_ns is None else (loop.full_since_ns + offset) / NS
            found.append(Resource(f"event loop of {loop.process}", loop.busy, loop.history, full_s))
        return tuple(found)

    def _traffic(self, now: int, offset: int) -> Traffic:
        recent, seconds = self.recent, self.recent.seconds
        length_s = seconds.length_s(NOW_S, now)

        def rate(field: Callable[[Slot], float]) -> float:
            return sum(field(slot) for slot in seconds.last(NOW_S, now)) / length_s

        failing = recent.failing.since(now)
        return Traffic(
            calls_per_s=rate(lambda slot: slot.calls),
            texts_per_s=rate(lambda slot: slot.texts),
            tokens_per_s=rate(lambda slot: slot.tokens),
            refused_per_s=rate(lambda slot: slot.refused),
            failed_per_s=rate(lambda slot: slot.failed),
            mistaken_per_s=rate(lambda slot: slot.mistaken),
            last_mistake=recent.last_mistake,
            calls=tuple(seconds.history(lambda slot: slot.calls, now)),
            tokens=tuple(seconds.history(lambda slot: slot.tokens, now)),
            refused=tuple(seconds.history(lambda slot: slot.refused, now)),
            failed=tuple(seconds.history(lambda slot: slot.failed, now)),
            mistaken=tuple(seconds.history(lambda slot: slot.mistaken, now)),
            by_status=dict(recent.by_status.most_common()),
            in_flight=recent.in_flight,
            failing_since_s=None if failing is None else (failing + offset) / NS,
        )

    def _buckets(self, engine: Engine, depth: Depth, now: int) -> tuple[Bucket, ...]:
        census = engine.scheduler.census(now)
        waiting = {
            edge: (items, census.tokens_by_bucket[edge], census.oldest_ns_by_bucket[edge] / NS)
            for edge, items in depth.waiting_by_bucket.items()
        }
        return self.recent.samples.buckets(self._edges, now, waiting)

    def _batches(self, engine: Engine, now: int) -> Batches:
        recent, cost = self.recent, engine.scheduler.cost
        passes = [done for done in recent.passes if now - done[0] < WINDOW_S * NS]
        tokens, computed = sum(done[2] for done in passes), sum(done[3] for done in passes)
        length_s = recent.seconds.length_s(NOW_S, now)
        return Batches(
            passes=len(passes),
            over_s=(now - passes[0][0]) / NS if passes else 0.0,
            per_s=sum(slot.batches for slot in recent.seconds.last(NOW_S, now)) / length_s,
            rows=sum(done[1] for done in passes) / len(passes) if passes else None,
            tokens=tokens / len(passes) if passes else None,
            efficiency=tokens / computed if computed else None,
            duration=latency_of(done[4] for done in passes),
            sizes=_sizes([done[1] for done in passes], self._config.scheduling.max_batch_items),
            max_items=self._config.scheduling.max_batch_items,
            max_tokens=engine.scheduler.max_batch_tokens,
            outcomes=dict(recent.outcomes.most_common()),
            fixed_s=cost.batch_ns / NS,
            per_token_s=cost.token_ns / NS,
        )

    def _admission(self, engine: Engine, depth: Depth, now: int, offset: int) -> Admission:
        recent = self.recent
        slots = list(recent.seconds.last(NOW_S, now))
        calls, refused = sum(slot.calls for slot in slots), sum(slot.refused for slot in slots)
        since = recent.shedding.since(now)
        report = engine.load()
        return Admission(
            accepting=report.accepting_requests,
            state=report.state,
            share=refused / calls if calls else 0.0,
            since_s=None if since is None else (since + offset) / NS,
            policies=(*self._policies(engine, depth, now), *self._limits(engine)),
            refusals=recent.refusals(now, offset),
        )

    def _policies(self, engine: Engine, depth: Depth, now: int) -> list[Policy]:
        scheduler = engine.scheduler
        load, said = scheduler.opinions(ORDINARY_TOKENS, now)
        figures = scheduler.figures(now)
        return [
            Policy(name, _reason(refusal), policy_figures(name, figures[name], load, depth, self._config))
            for name, refusal in said.items()
        ]

    def _limits(self, engine: Engine) -> tuple[Policy, ...]:
        """What refuses before any policy is asked."""
        calls = float(engine.requests)
        most = self._config.limits.max_requests_in_flight
        used, pending = self._tokenizer_use(engine)
        return (
            Policy(
                "in_flight",
                "TOO_MANY_REQUESTS_IN_FLIGHT" if calls >= most else None,
                (Figure("calls here", calls, "calls", most),),
            ),
            Policy(
                "tokenizer",
                "TOKENIZER_QUEUE_FULL" if used >= pending else None,
                (Figure("waiting or at work", used, "calls", pending),),
            ),
        )

    def _tokenizer_use(self, engine: Engine) -> tuple[int, int]:
        """Calls that wait for a tokenizer thread or have one, and how many may, in all processes that have calls."""
        most = self._config.tokenizer.max_pending
        if self._merged is None:
            return engine.tokenizer_use.pending, most
        return self._merged.tokenizer_pending, most * max(1, len(self._merged.loops))

    def _device(self, engine: Engine, now: int, offset: int) -> Device:
        recent, memory = self.recent, engine.device if engine.loaded else None
        age_ns = engine.pass_age_ns
        canary, canary_ns = recent.canary if recent.canary is not None else (None, None)
        return Device(
            pass_age_s=age_ns / NS if age_ns else None,
            last_pass_s=None if recent.last_pass_ns is None else (recent.last_pass_ns + offset) / NS,
            stalled=engine.stalled,
            stalls=recent.stalls,
            last_stall_s=None if recent.last_stall_ns is None else (recent.last_stall_ns + offset) / NS,
            stall_limit_s=self._config.health.stall_ms / 1000,
            canary=canary,
            canary_s=None if canary_ns is None else (canary_ns + offset) / NS,
            suspect=None if engine.scheduler.suspect is None else "passes fail alike",
            memory_used_bytes=memory.memory_used_bytes if memory else 0,
            memory_total_bytes=memory.memory_total_bytes if memory else 0,
            retry_items=engine.scheduler.census(now).retry_items,
        )

    def _tokenizer(self, engine: Engine, now: int) -> Tokenizer:
        recent = self.recent
        pending, max_pending = self._tokenizer_use(engine)
        pieces = sum(slot.tokenized for slot in recent.seconds.last(NOW_S, now))
        return Tokenizer(
            threads=self._threads,
            pending=pending,
            max_pending=max_pending,
            wait=latency_of(waited for at, waited in recent.waits if now - at < WINDOW_S * NS),
            pieces_per_s=pieces / recent.seconds.length_s(NOW_S, now),
        )

    def _requests(self, now: int, offset: int) -> Requests:
        recent = self.recent
        slow = {id(call): call for call in (*recent.slowest.top(now), *recent.slowest_traced.top(now))}
        ordered = sorted(slow.values(), key=lambda call: -call.duration_ns)
        return Requests(
            slow=tuple(call.shown(offset) for call in ordered[: 2 * SLOWEST]),
            refused=tuple(call.shown(offset) for call in recent.refused()),
            failed=tuple(call.shown(offset) for call in reversed(recent.failed)),
        )


def _reason(refusal: Rejection | None) -> str | None:
    return None if refusal is None else refusal.reason


def _sizes(rows: list[int], most: int) -> tuple[Sizes, ...]:
    """Passes by texts: 1, 2, 3 to 4, 5 to 8, and so on, up to the largest that may be."""
    counts: dict[int, int] = dict.fromkeys(range((most - 1).bit_length() + 1), 0)
    for count in rows:
        counts[(count - 1).bit_length()] += 1
    return tuple(
        Sizes(1 if power == 0 else (1 << (power - 1)) + 1, min(1 << power, most), passes)
        for power, passes in counts.items()
    )


def _spread(begin_ns: int, end_ns: int) -> list[tuple[int, float]]:
    """Each second from ``begin_ns`` to ``end_ns``, and how much of it lies between them."""
    first = max(begin_ns // NS, end_ns // NS - RECENT_S)
    return [
        (second, (min(end_ns, (second + 1) * NS) - max(begin_ns, second * NS)) / NS)
        for second in range(first, end_ns // NS + 1)
    ]
