"""Spans, built after the fact from marks.

Decides which spans a request and a batch have, and their names, attributes and links. Must never know queues, exporters
or the event loop: everything here runs in the export thread, for sampled requests only.

    embedserve.v1.EmbeddingService/Embed     SERVER, child of the caller's span
    ├── validate
    ├── admit                                early, on an estimate
    ├── tokenize
    ├── admit                                exact, on real tokens
    ├── queue                                bucket
    ├── forward                              linked to the batch (or batches) that it rode in
    └── respond

    batch                                    its own trace, linked to the SERVER span of each sampled request in it
    ├── dispatch                             handed over, until the worker takes it up
    ├── assemble, copy_in, forward, pool, copy_out
    └── return                               until the event loop has the result

    compile                                  its own trace: another form of the model was made and took over

Children share their borders, so that their sum is the parent: exactly, not nearly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from opentelemetry.trace import SpanContext

from embedserve.engine.observer import BatchRecord, Member
from embedserve.engine.stages import Boarding, Stages
from embedserve.telemetry import semconv
from embedserve.telemetry.segments import ADMIT_EXACT, Marks, Segment, segments_between
from embedserve.telemetry.span_catalogue import BATCH_SPAN, COMPILE_SPAN
from embedserve.telemetry.span_chain import Chain, ChainForm
from embedserve.telemetry.span_data import (
    NO_ATTRIBUTES,
    SERVER,
    Child,
    LinkData,
    SharedAttributes,
    Value,
)
from embedserve.telemetry.span_tree import SpanFactory, SpanTree

__all__ = ["BatchTrace", "CallRecord", "CompileTrace", "error_kind"]

_NS_PER_MS: Final = 1e6

_KEPT_MAX: Final = 512
"""Sets of attributes that are kept written down, some 1 KB each: calls of one caller, or of one batch, share them."""

Pairs = tuple[tuple[str, str | int | float | bool], ...]


def error_kind(status: str, error_type: str | None, attributes: Mapping[str, str | int | float | bool]) -> str:
    """``expected`` or ``unexpected``, of a call that is not OK.

    A fault of ours has an error id, whatever its status; a device that is silent has none, since a pass is all that it
    waits for.
    """
    ours = "error_id" in attributes or status in _FAULTS or error_type in _FAULT_WORDS
    return semconv.UNEXPECTED if ours else semconv.EXPECTED


_FAULTS: Final = frozenset({"UNKNOWN", "INTERNAL", "DATA_LOSS"})
_FAULT_WORDS: Final = frozenset({"ENGINE_STALLED", "ENGINE_FAILED"})


class CallRecord(NamedTuple):
    """A sampled call that has ended: all that its spans need."""

    context: SpanContext
    parent: SpanContext | None
    method: str
    peer: str
    arrived_ns: int
    ended_ns: int
    status: str
    error_type: str | None
    attributes: Mapping[str, str | int | float | bool]
    marks: Marks | None
    """Of ``stages``, when the call ended."""
    stages: Stages | None
    forced: bool = False
    """The caller has asked for this trace."""

    @property
    def span_count(self) -> int:
        """Spans that it will be, about."""
        return 1 if self.marks is None else 1 + sum(map(bool, self.marks))

    def tree(self, factory: SpanFactory) -> SpanTree:
        """The SERVER span and its children."""
        kind = None if self.status == "OK" else error_kind(self.status, self.error_type, self.attributes)
        is_error = kind == semconv.UNEXPECTED or self.status in semconv.SERVER_FAULTS
        well = self.status == "OK" and self.error_type is None
        attributes, steady = self._split() if well else (self._all(kind), ())
        server = factory.span(
            self.context, self.parent, self.method, self.arrived_ns, self.ended_ns, kind=SERVER, attributes=attributes,
            shared=_of_calls(self.method, self.status, self.peer, steady),
            error=(self.error_type or self.status) if is_error else None,
        )  # fmt: skip
        return factory.tree(server, self._children(factory.offset_ns))

    def _children(self, offset_ns: int) -> list[Child] | Chain:
        stages, marks, ended_ns = self.stages, self.marks, self.ended_ns
        if stages is None or marks is None:
            return []
        answered = self.status == "OK"
        if answered and 0 not in marks and _ascends(marks, ended_ns):
            return _answered(self.arrived_ns, marks, ended_ns, stages, offset_ns)
        children: list[Child] = []
        if marks[0] > self.arrived_ns:
            receive: Child = ("receive", self.arrived_ns + offset_ns, marks[0] + offset_ns, NO_ATTRIBUTES, ())
            children.append(receive)
        parts = segments_between(marks, ended_ns, answered=answered)
        for name, begin_ns, end_ns, attributes, links in _stretches(parts, stages, ended_ns):
            children.append((name, begin_ns + offset_ns, end_ns + offset_ns, attributes, links))
        return children

    def _split(self) -> tuple[dict[str, Value], Pairs]:
        """Attributes that differ from call to call, and what calls of one caller share: kept written down for the next.

        Only of calls that were answered, where each name has values of one type: 1 and True are the same key.
        """
        attributes = self._own()
        told = dict(self.attributes)
        for key in _VARYING:
            value = told.pop(key, None)
            if value is not None:
                attributes[_KNOWN[key]] = value
        return attributes, tuple(told.items())

    def _own(self) -> dict[str, Value]:
        attributes: dict[str, Value] = {}
        if self.stages is not None and self.stages.tokens:
            attributes[semconv.GEN_AI_USAGE_INPUT_TOKENS] = self.stages.tokens
        if self.forced:
            attributes[semconv.FORCED] = True
        return attributes

    def _all(self, kind: str | None) -> dict[str, Value]:
        """Of a call that was not answered."""
        attributes = self._own()
        _name(self.attributes.items(), attributes)
        if kind is not None:
            attributes[semconv.ERROR_KIND] = kind
        if self.error_type is not None:
            attributes[semconv.ERROR_TYPE] = self.error_type
            if "policy" in self.attributes:
                attributes[semconv.ADMISSION_REASON] = self.error_type
        return attributes


def _name(told: Iterable[tuple[str, str | int | float | bool]], attributes: dict[str, Value]) -> None:
    """Add what the API has ``told`` to ``attributes``, by its name there."""
    for key, value in told:
        name = _KNOWN.get(key)
        if name is not None:
            attributes[name] = [str(value)] if name is semconv.GEN_AI_ENCODING_FORMATS else value
        elif not isinstance(value, str):
            # Numbers have no words in them; a string under an unknown name could be anything, even a text.
            attributes[key if key.startswith("embedserve.") else semconv.ADMISSION_FIGURE + key] = value


def _ascends(marks: Marks, ended_ns: int) -> bool:
    arrived, validated, admitted, tokenized, queued, dequeued, assembled, computed = marks
    return arrived <= validated <= admitted <= tokenized <= queued <= dequeued <= assembled <= computed <= ended_ns


def _answered(arrived_ns: int, marks: Marks, ended_ns: int, stages: Stages, offset_ns: int) -> Chain:
    """The children of most calls, without a look at each: what ``_stretches`` makes of marks that are all set."""
    begun, validated, admitted, tokenized, queued, dequeued, _, computed = marks
    borders = [begun, validated, admitted, tokenized, queued, dequeued, computed, ended_ns]
    form = _ANSWERED
    if begun > arrived_ns:
        borders.insert(0, arrived_ns)
        form = _RECEIVED
    links = [_batch_link(boarding) for boarding in stages.boardings]
    return Chain(form, [border + offset_ns for border in borders], _queue_attributes(stages), links)


def _stretches(parts: Sequence[Segment], stages: Stages, ended_ns: int) -> Iterator[Child]:
    """The children of a call that went through ``parts``, on the monotonic clock."""
    begun_ns = 0
    for stage, begin_ns, end_ns in parts:
        if stage == "assemble" and parts[-1][0] != "assemble":
            # The request's own view: one stretch in the worker, told apart in the batch's trace.
            begun_ns = begin_ns
        elif stage in _IN_WORKER:
            links = [_batch_link(boarding) for boarding in stages.boardings]
            yield "forward", begun_ns or begin_ns, end_ns, NO_ATTRIBUTES, links
        elif stage == "queue":
            # Its marks are set when a pass has ended: who expires while the device is at work has none, and yet
            # it did not wait in the queue any more.
            away_ns = end_ns
            if end_ns == ended_ns and stages.boardings:
                away_ns = min(max(stages.boardings[-1].dispatched_ns, begin_ns), end_ns)
            yield stage, begin_ns, away_ns, _queue_attributes(stages), ()
            if away_ns < end_ns:
                links = [_batch_link(boarding) for boarding in stages.boardings]
                yield "forward", away_ns, end_ns, NO_ATTRIBUTES, links
        elif stage in _ADMIT:
            yield "admit", begin_ns, end_ns, _ADMIT[stage], ()
        else:
            yield stage, begin_ns, end_ns, NO_ATTRIBUTES, ()


_IN_WORKER: Final = ("assemble", "forward")
_ADMIT: Final[Mapping[str, Mapping[str, Value]]] = {
    "admit": SharedAttributes({semconv.ADMISSION_STAGE: "estimate"}),
    ADMIT_EXACT: SharedAttributes({semconv.ADMISSION_STAGE: "exact"}),
}
_ANSWERED: Final = ChainForm(
    (
        ("validate", NO_ATTRIBUTES), ("admit", _ADMIT["admit"]), ("tokenize", NO_ATTRIBUTES),
        ("admit", _ADMIT[ADMIT_EXACT]), ("queue", NO_ATTRIBUTES), ("forward", NO_ATTRIBUTES),
        ("respond", NO_ATTRIBUTES),
    ),
    attributed="queue",
    linked="forward",
)  # fmt: skip
"""Of a call that went through every stage, once."""
_RECEIVED: Final = _ANSWERED.after("receive")
"""And whose message took a moment to come."""
_KNOWN: Final = {
    "model": semconv.GEN_AI_REQUEST_MODEL,
    "dimensions": semconv.GEN_AI_DIMENSION_COUNT,
    "encoding": semconv.GEN_AI_ENCODING_FORMATS,
    "texts": semconv.TEXTS,
    "policy": semconv.ADMISSION_POLICY,
    "reason": semconv.ADMISSION_REASON,
    "retry_after_ms": "embedserve.admission.retry_after_ms",
    "truncated": "embedserve.truncated",
    "tenant": semconv.TENANT,
    "priority": "embedserve.priority",
    "attempt": "embedserve.attempt",
    "deadline_ms": semconv.DEADLINE_MS,
    "error_id": "embedserve.error_id",
}
"""What the API tells of a call, and the attribute that it becomes. Other numbers are figures of an admission policy."""
_VARYING: Final = ("texts", "deadline_ms")
"""What of it is another from call to call."""


class BatchTrace(NamedTuple):
    """A pass in which a sampled request rode."""

    context: SpanContext
    record: BatchRecord
    """Without its members and its error: a traceback keeps a whole batch alive, and spans may wait for minutes."""
    requests: int
    sampled: Sequence[Member]

    @property
    def span_count(self) -> int:
        """Spans that it will be."""
        return 1 if self.record.times is None else 8

    def tree(self, factory: SpanFactory) -> SpanTree:
        """The batch span and its children."""
        record, times = self.record, self.record.times
        root = factory.span(
            self.context,
            None,
            BATCH_SPAN,
            record.dispatched_ns,
            record.returned_ns,
            attributes=self._attributes(),
            links=[_member_link(member) for member in self.sampled],
            error=None if record.outcome in _WELL else record.outcome,
        )
        if times is None:
            return factory.tree(root, ())
        at, last_ns = record.dispatched_ns, record.returned_ns
        borders = [at]
        for mark in (
            times.start_ns, times.assembled_ns, times.copied_in_ns, times.forward_ns, times.pooled_ns,
            times.copied_out_ns, last_ns,
        ):  # fmt: skip
            at = min(max(mark, at), last_ns)
            borders.append(at)
        return factory.tree(root, Chain(_PASS, [border + factory.offset_ns for border in borders]))

    def _attributes(self) -> dict[str, Value]:
        batch = self.record.batch
        attributes: dict[str, Value] = {
            semconv.BATCH_ID: batch.id,
            semconv.BATCH_SHAPE: batch.shape.value,
            semconv.BATCH_EDGE: batch.edge,
            semconv.BATCH_ROWS: batch.rows,
            semconv.BATCH_TOKENS: batch.tokens,
            semconv.BATCH_PADDED_TOKENS: batch.padded_tokens,
            semconv.BATCH_REQUESTS: self.requests,
            semconv.BATCH_REQUESTS_SAMPLED: len(self.sampled),
            semconv.BATCH_ATTEMPT: batch.attempt,
            semconv.BATCH_OUTCOME: self.record.outcome,
            semconv.BATCH_PREDICTED_MS: self.record.predicted_ns / _NS_PER_MS,
        }
        if self.record.outcome not in _WELL:
            attributes[semconv.ERROR_TYPE] = self.record.outcome
        return attributes


_WELL: Final = ("ok", "skipped")
_PASS: Final = ChainForm(
    [(name, NO_ATTRIBUTES) for name in ("dispatch", "assemble", "copy_in", "forward", "pool", "copy_out", "return")]
)


class CompileTrace(NamedTuple):
    """How a compiled model was made: once in a process, so always sampled."""

    context: SpanContext
    ended_ns: int
    took_ns: int
    outcome: str
    """``compiled``, ``cached`` or ``failed``."""

    @property
    def span_count(self) -> int:
        """It is one."""
        return 1

    def tree(self, factory: SpanFactory) -> SpanTree:
        """The span, which ends when passes began to run through the compiled model."""
        attributes: dict[str, Value] = {semconv.COMPILE_OUTCOME: self.outcome}
        begun_ns = self.ended_ns - self.took_ns
        error = "COMPILE_FAILED" if self.outcome == "failed" else None
        if error is not None:
            attributes[semconv.ERROR_TYPE] = error
        root = factory.span(
            self.context, None, COMPILE_SPAN, begun_ns, self.ended_ns, attributes=attributes, error=error
        )
        return factory.tree(root, ())


def _member_link(member: Member) -> LinkData:
    assert isinstance(member.trace, SpanContext)
    return LinkData(member.trace, _of_member(member.first_index, member.rows, member.tokens))


@lru_cache(_KEPT_MAX)
def _of_member(first_index: int, rows: int, tokens: int) -> SharedAttributes:
    return SharedAttributes(
        {semconv.LINK_FIRST_INDEX: first_index, semconv.LINK_ROWS: rows, semconv.LINK_TOKENS: tokens}
    )


def _batch_link(boarding: Boarding) -> LinkData:
    assert isinstance(boarding.trace, SpanContext)
    return LinkData(boarding.trace, _of_batch(boarding.batch_id, boarding.batch_rows, boarding.rows))


@lru_cache(_KEPT_MAX)
def _of_batch(batch_id: int, batch_rows: int, rows: int) -> SharedAttributes:
    return SharedAttributes({semconv.BATCH_ID: batch_id, semconv.BATCH_ROWS: batch_rows, semconv.LINK_ROWS: rows})


def _queue_attributes(stages: Stages) -> dict[str, Value]:
    return {
        semconv.BUCKET: stages.bucket,
        semconv.TEXTS: stages.texts,
        semconv.TOKENS: stages.tokens,
        semconv.QUEUE_ITEMS: stages.waiting_items,
        semconv.QUEUE_TOKENS: stages.waiting_tokens,
        semconv.PREDICTED_MS: stages.predicted_ns / _NS_PER_MS,
    }


@lru_cache(_KEPT_MAX)
def _of_calls(method: str, status: str, peer: str, steady: Pairs) -> SharedAttributes:
    """What all calls of a caller share."""
    found: dict[str, Value] = {
        semconv.RPC_SYSTEM_NAME: semconv.GRPC,
        semconv.RPC_METHOD: method,
        semconv.RPC_STATUS_CODE: status,
        **_peer(peer),
    }
    if method in semconv.EMBEDDING_METHODS:
        found[semconv.GEN_AI_OPERATION_NAME] = semconv.EMBEDDINGS
        found[semconv.GEN_AI_PROVIDER_NAME] = semconv.PROVIDER
    _name(steady, found)
    return SharedAttributes(found)


def _peer(peer: str) -> dict[str, Value]:
    # grpc writes "ipv4:10.0.0.1:50051", "ipv6:%5B::1%5D:50051" or "unix:path".
    family, _, rest = peer.partition(":")
    if family == "unix":
        return {semconv.NETWORK_PEER_ADDRESS: rest or "unix"}
    host, _, port = rest.replace("%5B", "").replace("%5D", "").rpartition(":")
    if family not in {"ipv4", "ipv6"} or not port.isdigit():
        return {}
    return {semconv.NETWORK_PEER_ADDRESS: host.strip("[]"), semconv.NETWORK_PEER_PORT: int(port)}
