"""Scenarios: who asks for what and when, on which device, under which settings.

A workload is drawn from a seeded ``random.Random`` only. Times are nanoseconds from the start.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from embedserve.scheduling.admission.gradient import GradientPolicy
from embedserve.scheduling.admission.latency_p95 import LatencyP95Policy
from embedserve.scheduling.admission.throughput import ThroughputPolicy
from embedserve.scheduling.item import Priority, Shape
from embedserve.scheduling.settings import GradientSettings, LatencyP95Settings, SchedulerSettings, ThroughputSettings

MS = 1_000_000
S = 1_000_000_000


@dataclass(frozen=True)
class Request:
    at_ns: int
    tokens: tuple[int, ...]
    patience_ns: int | None = None
    """Deadline after arrival."""
    priority: Priority = Priority.DEFAULT
    tenant: str = ""
    cancel_after_ns: int | None = None
    poison: frozenset[int] = frozenset()
    """Items whose pass raises."""
    nan: frozenset[int] = frozenset()
    """Items whose row is not finite when others ride along."""
    nan_always: frozenset[int] = frozenset()
    name: str = ""


@dataclass(frozen=True)
class Device:
    """A fake worker: a pass over ``T`` computed tokens takes ``batch_ns + token_ns * T``, give or take."""

    batch_ns: int = 2 * MS
    token_ns: int = 10_000
    jitter: float = 0.05
    """Width of the uniform spread around the time of a pass."""
    slow_share: float = 0.0
    """Share of the passes that take twice as long, as beside a neighbour who takes the cores."""
    hand_over_ns: int = 0
    """From the end of a pass to the begin of the next; no part of the device time that is reported."""
    oom_above_tokens: int | None = None
    stall_at_ns: int | None = None
    stall_ns: int = 0
    dies_at_ns: int | None = None
    broken_from_ns: int | None = None
    """From then on every pass fails, whatever is in it."""

    def tokens_per_second(self, settings: SchedulerSettings, tokens_per_item: float) -> float:
        """Capacity in the fullest batches."""
        full = min(settings.max_batch_tokens, int(settings.max_batch_items * tokens_per_item))
        return full * 1e9 / (self.batch_ns + self.token_ns * full)


@dataclass(frozen=True)
class Scenario:
    requests: Callable[[Random], Iterator[Request]]
    settings: SchedulerSettings = field(default_factory=lambda: SchedulerSettings(**SMALL))
    policies: Callable[[], list] = list
    device: Device = field(default_factory=Device)
    jumps: tuple[tuple[int, int], ...] = ()
    """The clock at an instant goes on by so much, as after SIGSTOP and SIGCONT."""
    drain_at_ns: int | None = None


SMALL = {
    "bucket_edges": (16, 32, 64, 128),
    "max_batch_tokens": 1_024,
    "max_batch_items": 64,
    "max_queue_items": 20_000,
    "max_queue_tokens": 1_000_000,
    "max_wait_ns": 50 * MS,
    "initial_batch_ns": 1 * MS,
    "initial_token_ns": 20_000,
}


def poisson(rng: Random, per_second: float, until_ns: int) -> Iterator[int]:
    at = 0
    while (at := at + int(rng.expovariate(per_second) * S)) < until_ns:
        yield at


def length(rng: Random, mean: int = 30, longest: int = 128) -> int:
    return max(1, min(int(rng.gammavariate(1.5, mean / 1.5)), longest))


def steady(rng):
    for at in poisson(rng, 400, S):
        yield Request(at, tuple(length(rng) for _ in range(rng.choice([1, 1, 1, 4, 16]))), patience_ns=2 * S)


def burst(rng):
    for k in range(4):
        for at in poisson(rng, 4_000, 30 * MS):
            yield Request(k * 250 * MS + at, (length(rng),), patience_ns=500 * MS)


def heavy_tail(rng):
    for at in poisson(rng, 150, S):
        count = min(int(rng.paretovariate(1.1)), 300)
        yield Request(at, tuple(length(rng, 40) for _ in range(count)), patience_ns=rng.choice([None, 3 * S]))


def bulk_beside_interactive(rng):
    yield Request(0, tuple(length(rng) for _ in range(10_000)), name="bulk")
    for at in poisson(rng, 40, 2 * S):
        yield Request(at + 5 * MS, (length(rng, 10, 16),), name="one")


def long_among_short(rng):
    for at in poisson(rng, 6_000, S):
        yield Request(at, (rng.randint(4, 14),), name="short")
    for at in poisson(rng, 20, S):
        yield Request(at, (rng.randint(100, 128),), name="long")


def cancel_storm(rng):
    for at in poisson(rng, 2_000, 600 * MS):
        yield Request(
            at,
            tuple(length(rng) for _ in range(rng.randint(1, 30))),
            cancel_after_ns=rng.choice([None, 0, rng.randint(0, 100 * MS)]),
        )


def tiny_deadlines(rng):
    for at in poisson(rng, 800, S):
        yield Request(at, (length(rng),), patience_ns=rng.choice([1, 2, 5, 10, 20, 50]) * MS)


def patient(rng):
    for at in poisson(rng, 500, S):
        yield Request(at, tuple(length(rng) for _ in range(rng.randint(1, 4))), patience_ns=rng.choice([S, 5 * S]))


def overload_2x(rng):
    # 29 tokens a text and 84k tokens/s in full batches make 2,850 texts/s the capacity of the default device.
    for at in poisson(rng, 5_800, 3 * S):
        yield Request(at, (length(rng),), patience_ns=2 * S)


def poisoned(rng):
    for at in poisson(rng, 300, 600 * MS):
        tokens = tuple(length(rng) for _ in range(rng.randint(1, 12)))
        one = frozenset({rng.randrange(len(tokens))})
        fault = rng.random()
        yield Request(
            at,
            tokens,
            patience_ns=2 * S,
            poison=one if fault < 0.03 else frozenset(),
            nan=one if 0.03 <= fault < 0.06 else frozenset(),
            nan_always=one if 0.06 <= fault < 0.08 else frozenset(),
            cancel_after_ns=rng.choice([None, None, None, rng.randint(0, 30 * MS)]),
        )


def poison_only(rng):
    """A caller with nothing but poison, and others; for a while it is alone."""
    for at in poisson(rng, 60, S):
        yield Request(at, (length(rng),), tenant="mallory", poison=frozenset({0}), name="mallory")
    for at in poisson(rng, 200, S):
        if not 300 * MS < at < 700 * MS:
            yield Request(at, (length(rng),), patience_ns=500 * MS, tenant=rng.choice("ab"), name="innocent")


def poison_stream(tenants="abc"):
    """Three callers with half of the capacity together, and one with 0.6 of it, 1 % of which is poison."""

    def requests(rng):
        for at in poisson(rng, 0.6 * CPU_TEXTS_PER_S, 20 * S):
            yield Request(
                at,
                (128,),
                patience_ns=2 * S,
                tenant="mallory" if tenants else "",
                poison=frozenset({0} if rng.random() < 0.01 else ()),
                name="mallory",
            )
        for at in poisson(rng, 0.5 * CPU_TEXTS_PER_S, 20 * S):
            tenant = rng.choice(tenants) if tenants else ""
            yield Request(at, (128,), patience_ns=2 * S, tenant=tenant, name="innocent")

    return requests


def classes(rng):
    for priority, per_second in ((Priority.INTERACTIVE, 5_000), (Priority.DEFAULT, 800), (Priority.BULK, 300)):
        for at in poisson(rng, per_second, 600 * MS):
            yield Request(at, (length(rng),), priority=priority, tenant=rng.choice("abc"), name=priority.name)


def bucketed(**changes) -> SchedulerSettings:
    return SchedulerSettings(**(SMALL | {"shape": Shape.BUCKETED} | changes))


def throughput():
    return [ThroughputPolicy(ThroughputSettings(max_drain_ns=500 * MS))]


def latency():
    return [LatencyP95Policy(LatencyP95Settings(slo_ns=250 * MS, soft_ns=200 * MS, hard_ns=250 * MS, window_ns=S))]


def both():
    return throughput() + latency()


CPU = Device(batch_ns=5 * MS, token_ns=68_000, jitter=0.2, slow_share=0.02, hand_over_ns=1 * MS)
"""Two slow cores: 32 texts of 128 tokens take 283 ms, 10 % more or less, and now and then twice that."""
CPU_TEXTS_PER_S = 32e9 / (1.02 * CPU.batch_ns + 1.02 * 32 * 128 * CPU.token_ns + CPU.hand_over_ns)
"""Its capacity in the fullest batches: 110 texts/s."""


def on_cpu(times, patience_ns, until_ns=20 * S):
    """Texts of 128 tokens, at so many times the capacity, all with the same deadline."""

    def requests(rng):
        for at in poisson(rng, times * CPU_TEXTS_PER_S, until_ns):
            yield Request(at, (128,), patience_ns=patience_ns)

    return requests


def cpu_burst(rng):
    """0.6 times the capacity; for 3 s, 5 times."""
    for at in poisson(rng, 0.6 * CPU_TEXTS_PER_S, 20 * S):
        yield Request(at, (128,), patience_ns=S)
    for at in poisson(rng, 4.4 * CPU_TEXTS_PER_S, 3 * S):
        yield Request(8 * S + at, (128,), patience_ns=S)


def service_throughput():
    return [ThroughputPolicy(ThroughputSettings(max_drain_ns=2 * S))]


def service_latency():
    return [LatencyP95Policy(LatencyP95Settings(slo_ns=500 * MS, soft_ns=250 * MS, hard_ns=500 * MS, window_ns=10 * S))]


def service_gradient():
    return [GradientPolicy(GradientSettings(max_batch_tokens=4_096))]


POLICIES: dict[str, Callable[[], list]] = {
    "none": list,
    "throughput": service_throughput,
    "latency_p95": service_latency,
    "gradient": service_gradient,
    "throughput+latency_p95": lambda: service_throughput() + service_latency(),
    "all": lambda: service_throughput() + service_latency() + service_gradient(),
}
"""As a service has them by default, and combined."""


def cpu(requests, policies, device=CPU) -> Scenario:
    settings = SchedulerSettings(
        bucket_edges=(16, 32, 64, 128, 256),
        max_batch_tokens=4_096,
        max_queue_tokens=128 * 4_096,
        initial_batch_ns=6 * MS,
        initial_token_ns=60_000,
    )
    return Scenario(requests, settings, POLICIES[policies], device)


OVERLOADS: dict[str, Scenario] = {
    f"cpu_{times}x_{patience_ms}ms_{policies}": cpu(on_cpu(times, patience_ms * MS), policies)
    for times in (2, 4)
    for patience_ms in (1_000, 500)
    for policies in POLICIES
}
BURSTS: dict[str, Scenario] = {f"cpu_burst_{policies}": cpu(cpu_burst, policies) for policies in POLICIES}

SCENARIOS: dict[str, Scenario] = {
    **OVERLOADS,
    **BURSTS,
    "steady": Scenario(steady),
    "steady_bucketed": Scenario(steady, bucketed()),
    "burst": Scenario(burst, policies=both),
    "heavy_tail": Scenario(heavy_tail, policies=throughput),
    "heavy_tail_bucketed": Scenario(heavy_tail, bucketed(batch_sizes=(1, 2, 4, 8, 16, 32, 64))),
    "bulk_beside_interactive": Scenario(bulk_beside_interactive),
    "bulk_beside_interactive_bucketed": Scenario(bulk_beside_interactive, bucketed()),
    "long_among_short": Scenario(long_among_short),
    "long_among_short_bucketed": Scenario(long_among_short, bucketed()),
    "cancel_storm": Scenario(cancel_storm),
    "cancel_storm_bucketed": Scenario(cancel_storm, bucketed(max_queue_delay_ns=3 * MS)),
    "tiny_deadlines": Scenario(tiny_deadlines, policies=both),
    "clock_jump": Scenario(patient, policies=latency, jumps=((300 * MS, 20 * S), (600 * MS, 3_600 * S))),
    "overload_2x": Scenario(overload_2x, policies=throughput),
    "overload_2x_latency": Scenario(overload_2x, policies=latency),
    "poisoned": Scenario(poisoned),
    "poisoned_bucketed": Scenario(poisoned, bucketed()),
    "out_of_memory": Scenario(heavy_tail, device=Device(oom_above_tokens=300)),
    "stall": Scenario(patient, policies=throughput, device=Device(stall_at_ns=300 * MS, stall_ns=3 * S)),
    "death": Scenario(steady, device=Device(dies_at_ns=400 * MS)),
    "broken_device": Scenario(steady, device=Device(broken_from_ns=400 * MS)),
    "poison_only": Scenario(poison_only),
    "poison_stream": cpu(poison_stream(), "throughput"),
    "poison_stream_anonymous": cpu(poison_stream(""), "throughput"),
    "drain": Scenario(steady, drain_at_ns=500 * MS),
    "classes": Scenario(classes),
    "classes_bucketed": Scenario(classes, bucketed()),
}
