"""What is looked up when somebody reads the metrics: counters' values, the load, the process.

Decides which observable instrument reads what. Must never know the event loop: callbacks run in a reader's thread and
only read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from embedserve.model.backend import ModelIdentity
from embedserve.telemetry import instruments as table
from embedserve.telemetry.instruments import INSTRUMENTS, Instrument, Instruments, Kind
from embedserve.telemetry.load import LoadSnapshot, SharedSnapshot
from embedserve.telemetry.tally import CounterTally

__all__ = ["Gauges"]

_PROC: Final = Path("/proc/self")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_NONE: Final[Mapping[str, str]] = {}

_LOAD: Final[tuple[tuple[Instrument, Callable[[LoadSnapshot], float]], ...]] = (
    (table.RETRY_ITEMS, lambda load: load.retry_items),
    (table.RETRY_BUDGET, lambda load: load.retry_budget_s),
    (table.QUARANTINE, lambda load: load.quarantined_tenants),
    (table.ADMISSION_LIMIT, lambda load: load.limit_tokens),
    (table.ADMISSION_SIGNAL, lambda load: load.limit_signal),
    (table.TOKENIZER_THREADS, lambda load: load.tokenizer_threads),
    (table.TOKENIZER_BUSY, lambda load: load.tokenizer_busy),
    (table.TOKENIZER_QUEUE, lambda load: load.tokenizer_waiting),
    (table.RUNNING_ITEMS, lambda load: load.running_items),
    (table.RUNNING_TOKENS, lambda load: load.running_tokens),
    (table.PASS_AGE, lambda load: load.pass_age_s),
    (table.SERVICE_RATE, lambda load: load.service_rate_tokens_per_s),
    (table.DRAIN_TIME, lambda load: load.drain_s),
    (table.LATENCY_P95, lambda load: load.p95_s),
    (table.SHED_PROBABILITY, lambda load: load.shed_probability),
    (table.THETA, lambda load: load.theta),
    (table.MAX_BATCH_TOKENS, lambda load: load.max_batch_tokens),
    (table.COST_FIXED, lambda load: load.cost_fixed_s),
    (table.COST_PER_TOKEN, lambda load: load.cost_per_token_s),
    (table.ACCEPTING, lambda load: int(load.accepting)),
    (table.DEVICE_MEMORY_USED, lambda load: load.device_memory_used_bytes),
    (table.DEVICE_MEMORY_TOTAL, lambda load: load.device_memory_total_bytes),
    (table.WARM_UP, lambda load: load.warm_up_s),
    (table.GRAPHS_PLANNED, lambda load: load.graphs.planned),
    (table.GRAPHS_CAPTURED, lambda load: load.graphs.captured),
    (table.GRAPHS_CAPTURE_DURATION, lambda load: load.graphs.capture_s),
    (table.GRAPHS_MEMORY, lambda load: load.graphs.memory_bytes),
)
"""Gauges without a label, and the field that each shows."""
_EVERYWHERE: Final = frozenset(
    {table.TOKENIZER_THREADS.name, table.TOKENIZER_BUSY.name, table.TOKENIZER_QUEUE.name, table.ACCEPTING.name}
)
_OF_DEVICE: Final = frozenset(
    {
        *(instrument.name for instrument, _ in _LOAD if instrument.name not in _EVERYWHERE),
        table.QUEUE_ITEMS.name,
        table.QUEUE_TOKENS.name,
        table.QUEUE_OLDEST.name,
        table.ADMISSION_POLICY.name,
        table.MODEL_VARIANT.name,
        table.FRONT_END_SILENT.name,
        table.GRAPHS_PASSES.name,
    }
)
"""Gauges that only the process with the device has anything to say of."""

_Read = Callable[[], Iterable[Observation]]


class Gauges:
    """Registers an observable instrument for every counter and gauge of the table."""

    def __init__(
        self,
        meter: Meter,
        instruments: Instruments,
        snapshot: SharedSnapshot,
        edges: tuple[int, ...],
        log_lines: Callable[[], tuple[int, int]] = lambda: (0, 0),
        *,
        has_device: bool = True,
    ) -> None:
        """``edges`` are the scheduler's length buckets, shown at zero until a load source is registered.

        ``log_lines`` gives the lines that were written and those that were dropped. Without ``has_device`` there are no
        gauges of the queue and the device: zeros would say that they are idle.
        """
        self._instruments = instruments
        self._snapshot = snapshot
        self._edges = edges
        self._begun_s = time.monotonic()
        self._begun_unix_s = time.time()
        self._model: dict[str, str] | None = None
        readers: dict[str, _Read] = {
            table.ACTIVE_CALLS.name: lambda: _values(instruments.counter(table.ACTIVE_CALLS)),
            table.QUEUE_ITEMS.name: self._by_bucket(lambda load: load.waiting_items_by_bucket),
            table.QUEUE_TOKENS.name: self._by_bucket(lambda load: load.waiting_tokens_by_bucket),
            table.QUEUE_OLDEST.name: self._by_bucket(lambda load: load.oldest_age_s_by_bucket),
            table.ADMISSION_POLICY.name: self._policies,
            table.LOG_LINES.name: lambda: _lines(log_lines()),
            table.LIFECYCLE.name: self._lifecycle,
            table.MODEL_INFO.name: self._model_info,
            table.MODEL_VARIANT.name: self._variant,
            table.FRONT_END_SILENT.name: self._silent,
            table.ENGINE_SILENT.name: self._silent_engines,
            table.GRAPHS_PASSES.name: self._graph_passes,
            table.PROCESS_CPU.name: self._cpu,
            table.PROCESS_MEMORY.name: _memory,
            table.PROCESS_FDS.name: _file_descriptors,
            table.PROCESS_UPTIME.name: self._uptime,
            table.PROCESS_START.name: lambda: [Observation(self._begun_unix_s, _NONE)],
        }
        for instrument, field in _LOAD:
            readers[instrument.name] = self._load(field)
        for instrument in INSTRUMENTS:
            if instrument.kind is not Kind.HISTOGRAM and (has_device or instrument.name not in _OF_DEVICE):
                _register(meter, instrument, readers.get(instrument.name) or self._counter(instrument))

    def show_model(self, identity: ModelIdentity) -> None:
        """Show ``identity`` as the model that is served."""
        self._model = {label.name: str(getattr(identity, label.name)) for label in table.MODEL_INFO.labels}

    def _counter(self, instrument: Instrument) -> _Read:
        tally = self._instruments.counter(instrument)
        return lambda: _values(tally)

    def _load(self, field: Callable[[LoadSnapshot], float]) -> _Read:
        return lambda: [Observation(field(self._snapshot.read()), _NONE)]

    def _by_bucket(self, field: Callable[[LoadSnapshot], Mapping[int, float]]) -> _Read:
        def read() -> Iterable[Observation]:
            values = {**dict.fromkeys(self._edges, 0), **field(self._snapshot.read())}
            return [Observation(value, {"bucket": str(edge)}) for edge, value in values.items()]

        return read

    def _policies(self) -> Iterable[Observation]:
        selected = self._snapshot.read().policies
        return [Observation(int(policy in selected), {"policy": policy}) for policy in table.POLICIES]

    def _lifecycle(self) -> Iterable[Observation]:
        now = self._snapshot.read().lifecycle_state
        return [Observation(int(state == now), {"state": state}) for state in table.STATES]

    def _model_info(self) -> Iterable[Observation]:
        return [Observation(1, self._model)] if self._model is not None else []

    def _variant(self) -> Iterable[Observation]:
        now = self._snapshot.read().variant
        return [Observation(int(variant == now), {"variant": variant}) for variant in table.VARIANTS]

    def _silent(self) -> Iterable[Observation]:
        told = self._snapshot.read().silent_front_ends
        return [Observation(int(silent), {"frontend": name}) for name, silent in told.items()]

    def _silent_engines(self) -> Iterable[Observation]:
        told = self._snapshot.read().silent_engines
        return [Observation(int(silent), {"engine": name}) for name, silent in told.items()]

    def _graph_passes(self) -> Iterable[Observation]:
        graphs = self._snapshot.read().graphs
        return [Observation(graphs.hits, {"outcome": "hit"}), Observation(graphs.misses, {"outcome": "miss"})]

    def _cpu(self) -> Iterable[Observation]:
        times = os.times()
        return [Observation(times.user, {"cpu.mode": "user"}), Observation(times.system, {"cpu.mode": "system"})]

    def _uptime(self) -> Iterable[Observation]:
        return [Observation(time.monotonic() - self._begun_s, _NONE)]


def _register(meter: Meter, instrument: Instrument, read: _Read) -> None:
    def callback(_options: CallbackOptions) -> Iterable[Observation]:
        return read()

    create = meter.create_observable_counter if instrument.kind is Kind.COUNTER else meter.create_observable_gauge
    create(instrument.name, callbacks=[callback], unit=instrument.unit, description=instrument.description)


def _values(tally: CounterTally) -> Iterable[Observation]:
    return [Observation(cell.value, cell.attributes) for cell in tally.cells()]


def _lines(lines: tuple[int, int]) -> Iterable[Observation]:
    written, dropped = lines
    return [Observation(written, {"outcome": "written"}), Observation(dropped, {"outcome": "dropped"})]


def _memory() -> Iterable[Observation]:
    # Linux only, as the container images are; elsewhere there is no series rather than a wrong one.
    if not _PROC.exists():
        return []
    resident_pages = int((_PROC / "statm").read_text().split()[1])
    return [Observation(resident_pages * _PAGE_BYTES, _NONE)]


def _file_descriptors() -> Iterable[Observation]:
    return [Observation(sum(1 for _ in (_PROC / "fd").iterdir()), _NONE)] if _PROC.exists() else []
