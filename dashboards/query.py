"""PromQL over the metrics of the service.

Decides how a series is selected and how a rate, a quantile or a share is written. Must never know a panel or an alert.
Names come from the service's own table of instruments, and a label or a declared value that a metric does not have is
refused here, when the dashboards are made, rather than shown as an empty panel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from embedserve.telemetry.exposition import LABEL
from embedserve.telemetry.instruments import Instrument, Kind, prometheus_label, prometheus_name

__all__ = ["BOARD", "RULE", "Scope", "metric", "share", "short_method"]

_PARTS: Final = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count"), Kind.COUNTER: ("",), Kind.GAUGE: ("",)}

_OPERATORS: Final = {(False, False): "=", (False, True): "=~", (True, False): "!=", (True, True): "!~"}
"""By whether it is denied, and whether there are several values."""

Where = Mapping[str, str]
"""Label to value, or to several with ``|`` between them; a value that begins with ``!`` is what it is not."""


def metric(instrument: Instrument, part: str = "") -> str:
    """The name under which Prometheus has it; ``part`` is ``_bucket``, ``_sum`` or ``_count`` of a histogram.

    Raises:
        ValueError: an instrument of this kind has no such part.
    """
    if part not in _PARTS[instrument.kind]:
        raise ValueError(f"{instrument.name} is a {instrument.kind.value}: no part {part!r}")
    return prometheus_name(instrument.name, instrument.unit, instrument.kind) + part


def share(part: str, whole: str, *, spread: Sequence[str] = ()) -> str:
    """``part`` over ``whole``, and nothing rather than NaN where the whole is zero.

    ``spread`` are the labels that ``part`` has and ``whole`` has not.
    """
    matching = f" ignoring ({', '.join(spread)}) group_left ()" if spread else ""
    return f"{part} /{matching} ({whole} > 0)"


def short_method(query: str) -> str:
    """``query`` with a label ``method`` that is the last word of ``rpc_method``, for legends that can be read."""
    return f'label_replace({query}, "method", "$1", "rpc_method", ".+/(.+)")'


@dataclass(frozen=True, slots=True)
class Scope:
    """Which series a query sees, and over how long it looks."""

    matchers: str
    """Written into every selector."""
    window: str
    """Of rates."""
    keep: tuple[str, ...] = ()
    """Labels that every aggregation keeps."""

    def over(self, window: str) -> Scope:
        """The same series over another ``window``."""
        return Scope(self.matchers, window, self.keep)

    def each(self, *labels: str) -> Scope:
        """The same, and every aggregation keeps ``labels`` too."""
        return Scope(self.matchers, self.window, (*self.keep, *labels))

    def of_takers(self) -> Scope:
        """The same, of the processes that take calls: an instance serves where each of them does.

        Where front ends are processes of their own they know of each engine, and one of several may be silent.
        """
        others = f'{LABEL}!~"engine.*"'
        return Scope(f"{self.matchers},{others}" if self.matchers else others, self.window, self.keep)

    def series(self, instrument: Instrument, part: str = "", where: Where | None = None) -> str:
        """A selector. Raises ``ValueError`` for a label or a value that the metric does not have."""
        own = {prometheus_label(label.name): label.values for label in instrument.labels}
        matchers = [self.matchers] if self.matchers else []
        for label, wanted in (where or {}).items():
            if label != "le" or part != "_bucket":
                _check(instrument, own, label, wanted)
            values = wanted.removeprefix("!")
            matchers.append(f'{label}{_OPERATORS[wanted.startswith("!"), "|" in values]}"{values}"')
        inner = ",".join(matchers)
        return metric(instrument, part) + (f"{{{inner}}}" if inner else "")

    def rate(
        self, instrument: Instrument, by: Sequence[str] = (), *, where: Where | None = None, part: str = ""
    ) -> str:
        """Growth in a second, summed."""
        return self._sum(f"rate({self.series(instrument, part, where)}[{self.window}])", by)

    def increase(
        self, instrument: Instrument, by: Sequence[str] = (), *, where: Where | None = None, part: str = ""
    ) -> str:
        """Growth over the window, summed."""
        return self._sum(f"increase({self.series(instrument, part, where)}[{self.window}])", by)

    def total(
        self, instrument: Instrument, by: Sequence[str] = (), *, where: Where | None = None, part: str = ""
    ) -> str:
        """What a counter has come to since the start of each process: for what happens once in a while."""
        return self._sum(self.series(instrument, part, where), by)

    def quantile(self, q: float, instrument: Instrument, by: Sequence[str] = (), *, where: Where | None = None) -> str:
        """A quantile of a histogram."""
        return f"histogram_quantile({q}, {self.rate(instrument, (*by, 'le'), where=where, part='_bucket')})"

    def mean(self, instrument: Instrument, by: Sequence[str] = (), *, where: Where | None = None) -> str:
        """The mean of a histogram's observations."""
        total, count = (self.rate(instrument, by, where=where, part=part) for part in ("_sum", "_count"))
        return share(total, count)

    def gauge(
        self, instrument: Instrument, how: str = "sum", by: Sequence[str] = (), *, where: Where | None = None
    ) -> str:
        """A gauge, over the processes: ``how`` is an aggregation such as ``sum`` or ``max``."""
        return f"{how}{self._by(by)} ({self.series(instrument, '', where)})"

    def worst(self, ask: Callable[[Scope], str], by: Sequence[str] = ()) -> str:
        """The largest of what ``ask`` gives of each process: a late one is not made up for by its neighbours.

        Where front ends are processes of their own, an instance has several, told apart by a label; else one without.
        """
        return f"max{self._by(by)} ({ask(self.each('instance', LABEL))})"

    def _sum(self, inner: str, by: Sequence[str]) -> str:
        return f"sum{self._by(by)} ({inner})"

    def _by(self, by: Sequence[str]) -> str:
        labels = (*self.keep, *by)
        return f" by ({', '.join(labels)})" if labels else ""


def _check(instrument: Instrument, own: Mapping[str, Sequence[str]], label: str, wanted: str) -> None:
    if label not in own:
        raise ValueError(f"{instrument.name} has no label {label}")
    unknown = set(wanted.removeprefix("!").split("|")) - set(own[label]) if own[label] else set()
    if unknown:
        raise ValueError(f"{instrument.name}: {label} is never {sorted(unknown)}")


BOARD: Final = Scope('job=~"$job",instance=~"$instance"', "$__rate_interval")
"""Of a dashboard: what its variables choose. The model is chosen through the instances that serve it."""
RULE: Final = Scope("", "5m", ("job",))
"""Of a rule: every job that has our metrics, each for itself."""
