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

Children share their borders, so that their sum is the parent: exactly, not nearly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from embedserve.engine.observer import BatchRecord, Member
from embedserve.engine.stages import Ride, Stages
from embedserve.telemetry import semconv

__all__ = [
    "ADMIT_EXACT",
    "BATCH_SPAN",
    "SPANS",
    "BatchTrace",
    "CallRecord",
    "Segment",
    "SpanFactory",
    "SpanName",
    "error_kind",
    "segments",
]

ATTRIBUTE_CHARS_MAX: Final = 256
"""Of a string in a span; a caller names the model, and could name it with a megabyte."""
_NS_PER_MS: Final = 1e6

BATCH_SPAN: Final = "batch"


@dataclass(frozen=True, slots=True)
class SpanName:
    """One span of the catalogue."""

    name: str
    kind: str
    parent: str
    description: str


SPANS: Final = (
    *(SpanName(name, "SERVER", "the caller's span", "One RPC, arrival to answer.") for name in semconv.METHODS),
    SpanName("receive", "INTERNAL", "RPC", "From the headers until the whole message is here: the caller's upload."),
    SpanName("validate", "INTERNAL", "RPC", "Limits and options are checked."),
    SpanName("admit", "INTERNAL", "RPC", "Admission; embedserve.admission.stage: on an estimate, or on exact tokens."),
    SpanName("tokenize", "INTERNAL", "RPC", "Wait for a tokenizer thread, and its work."),
    SpanName("queue", "INTERNAL", "RPC", "In the bucket, until the worker takes up the last batch that it rides in."),
    SpanName("forward", "INTERNAL", "RPC", "In the worker; linked to each batch that it rode in."),
    SpanName("respond", "INTERNAL", "RPC", "The answer is built."),
    SpanName(BATCH_SPAN, "INTERNAL", "its own trace", "One pass; linked to the RPC of each sampled request in it."),
    SpanName("dispatch", "INTERNAL", BATCH_SPAN, "Handed over, until the worker takes it up."),
    SpanName("assemble", "INTERNAL", BATCH_SPAN, "Tokens are gathered and laid out."),
    SpanName("copy_in", "INTERNAL", BATCH_SPAN, "To the device."),
    SpanName("forward", "INTERNAL", BATCH_SPAN, "The model."),
    SpanName("pool", "INTERNAL", BATCH_SPAN, "Pooling and normalisation."),
    SpanName("copy_out", "INTERNAL", BATCH_SPAN, "Back from the device."),
    SpanName("return", "INTERNAL", BATCH_SPAN, "Until the event loop has the result."),
)  # fmt: skip
"""Every span, for the docs."""

Segment = tuple[str, int, int]
"""Stage, begin and end; monotonic nanoseconds."""

ADMIT_EXACT: Final = "admit_exact"
_NEXT: Final = ("validate", "admit", "tokenize", ADMIT_EXACT, "queue", "assemble", "forward", "respond")


def segments(stages: Stages, ended_ns: int, *, answered: bool) -> list[Segment]:
    """The stages that a call went through, without gaps, from its arrival to ``ended_ns``.

    A mark that was never set is left out. The last segment is the stage in which the call ended: ``respond`` when it
    was ``answered``, otherwise whatever follows the last mark that was reached.
    """
    at = stages.arrived_ns
    found: list[Segment] = []
    reached = 0
    marks = (
        stages.validated_ns, stages.admitted_ns, stages.tokenized_ns, stages.queued_ns, stages.dequeued_ns,
        stages.assembled_ns, stages.computed_ns,
    )  # fmt: skip
    for index, mark in enumerate(marks):
        if mark:
            # Windows of a stream overlap: a later window's mark may lie before an earlier window's next one.
            end = min(max(mark, at), ended_ns)
            found.append((_NEXT[index], at, end))
            at = end
            reached = index + 1
    found.append(("respond" if answered else _NEXT[reached], at, ended_ns))
    return found


def error_kind(status: str, error_type: str | None, attributes: Mapping[str, str | int | float | bool]) -> str:
    """``expected`` or ``unexpected``, of a call that is not OK.

    A fault of ours has an error id, whatever its status; a device that is silent has none, since a pass is all that it
    waits for.
    """
    ours = "error_id" in attributes or status in _FAULTS or error_type in _FAULT_WORDS
    return semconv.UNEXPECTED if ours else semconv.EXPECTED


_FAULTS: Final = frozenset({"UNKNOWN", "INTERNAL", "DATA_LOSS"})
_FAULT_WORDS: Final = frozenset({"ENGINE_STALLED", "ENGINE_FAILED"})


class SpanFactory:
    """Makes spans of one resource and scope, on the wall clock."""

    def __init__(self, resource: Resource, scope: InstrumentationScope, *, links_max: int) -> None:
        """``links_max`` links on one span; the first are kept."""
        self._resource = resource
        self._scope = scope
        self._limits = SpanLimits(max_links=links_max)
        self._ids = RandomIdGenerator()
        self.links_max = links_max
        self._offset_ns = 0
        self.set_clock()

    def set_clock(self) -> None:
        """Take the wall clock's distance from the monotonic one: before each export, since it may be stepped."""
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def child(self, parent: SpanContext, name: str, begin_ns: int, end_ns: int, **rest: object) -> ReadableSpan:
        """An INTERNAL span below ``parent``; ``rest`` may hold ``attributes`` and ``links``."""
        context = SpanContext(
            parent.trace_id, self._ids.generate_span_id(), False, parent.trace_flags, parent.trace_state
        )
        return self.span(context, parent, name, begin_ns, end_ns, **rest)  # type: ignore[arg-type]

    def span(
        self,
        context: SpanContext,
        parent: SpanContext | None,
        name: str,
        begin_ns: int,
        end_ns: int,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, AttributeValue] | None = None,
        links: Sequence[Link] = (),
        status: Status | None = None,
    ) -> ReadableSpan:
        """A finished span; times are monotonic nanoseconds."""
        limits = self._limits
        bounded = BoundedAttributes(
            limits.max_span_attributes, attributes, immutable=True,
            max_value_len=limits.max_span_attribute_length or ATTRIBUTE_CHARS_MAX,
        ) if attributes else None  # fmt: skip
        return ReadableSpan(
            name=name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=bounded,
            links=links,
            kind=kind,
            status=status or Status(StatusCode.UNSET),
            start_time=begin_ns + self._offset_ns,
            end_time=end_ns + self._offset_ns,
            instrumentation_scope=self._scope,
        )


@dataclass(frozen=True, slots=True)
class CallRecord:
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
    segments: Sequence[Segment]
    stages: Stages | None
    rides: Sequence[Ride]

    def spans(self, factory: SpanFactory) -> list[ReadableSpan]:
        """The SERVER span and its children."""
        server = factory.span(
            self.context,
            self.parent,
            self.method,
            self.arrived_ns,
            self.ended_ns,
            kind=SpanKind.SERVER,
            attributes=self._server_attributes(),
            status=Status(StatusCode.ERROR, self.error_type) if self._is_error else None,
        )
        return [server, *self._children(factory)]

    @property
    def _is_error(self) -> bool:
        return self.status in semconv.SERVER_FAULTS or (self.status != "OK" and self._kind == semconv.UNEXPECTED)

    @property
    def _kind(self) -> str:
        return error_kind(self.status, self.error_type, self.attributes)

    def _children(self, factory: SpanFactory) -> list[ReadableSpan]:
        spans: list[ReadableSpan] = []
        if self.segments and self.segments[0][1] > self.arrived_ns:
            spans.append(factory.child(self.context, "receive", self.arrived_ns, self.segments[0][1]))
        begun_ns = None
        for stage, begin_ns, end_ns in self.segments:
            attributes: dict[str, AttributeValue] = {}
            links: list[Link] = []
            name, start_ns = stage, begin_ns
            if stage == "assemble" and self.segments[-1][0] != "assemble":
                begun_ns = (
                    begin_ns  # the request's own view: one stretch in the worker, told apart in the batch's trace
                )
                continue
            if stage in {"assemble", "forward"}:
                name = "forward"
                start_ns, begun_ns = (begun_ns if begun_ns is not None else begin_ns), None
                links = [_ride_link(ride) for ride in self.rides if ride.trace is not None][: factory.links_max]
            elif stage in {"admit", ADMIT_EXACT}:
                name = "admit"
                attributes[semconv.ADMISSION_STAGE] = "estimate" if stage == "admit" else "exact"
            elif stage == "queue" and self.stages is not None:
                attributes = _queue_attributes(self.stages)
            spans.append(factory.child(self.context, name, start_ns, end_ns, attributes=attributes, links=links))
        return spans

    def _server_attributes(self) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {
            semconv.RPC_SYSTEM_NAME: semconv.GRPC,
            semconv.RPC_METHOD: self.method,
            semconv.RPC_STATUS_CODE: self.status,
            **_peer(self.peer),
        }
        if self.error_type is not None:
            attributes[semconv.ERROR_TYPE] = self.error_type
        if self.status != "OK":
            attributes[semconv.ERROR_KIND] = self._kind
        if self.method in semconv.EMBEDDING_METHODS:
            attributes[semconv.GEN_AI_OPERATION_NAME] = semconv.EMBEDDINGS
            attributes[semconv.GEN_AI_PROVIDER_NAME] = semconv.PROVIDER
        if "policy" in self.attributes and self.error_type is not None:
            attributes[semconv.ADMISSION_REASON] = self.error_type
        for key, value in self.attributes.items():
            name = _KNOWN.get(key)
            if name is not None:
                attributes[name] = [str(value)] if name is semconv.GEN_AI_ENCODING_FORMATS else value
            elif not isinstance(value, str):
                # Numbers have no words in them; a string under an unknown name could be anything, even a text.
                attributes[key if key.startswith("embedserve.") else semconv.ADMISSION_FIGURE + key] = value
        return attributes


_KNOWN: Final = {
    "model": semconv.GEN_AI_REQUEST_MODEL,
    "tokens": semconv.GEN_AI_USAGE_INPUT_TOKENS,
    "dimensions": semconv.GEN_AI_DIMENSION_COUNT,
    "encoding": semconv.GEN_AI_ENCODING_FORMATS,
    "texts": semconv.TEXTS,
    "policy": semconv.ADMISSION_POLICY,
    "reason": semconv.ADMISSION_REASON,
    "retry_after_ms": "embedserve.admission.retry_after_ms",
    "truncated": "embedserve.truncated",
    "tenant": "embedserve.tenant",
    "priority": "embedserve.priority",
    "attempt": "embedserve.attempt",
    "error_id": "embedserve.error_id",
}
"""What the API tells of a call, and the attribute that it becomes. Other numbers are figures of an admission policy."""


@dataclass(frozen=True, slots=True)
class BatchTrace:
    """A pass in which a sampled request rode."""

    context: SpanContext
    record: BatchRecord
    sampled: Sequence[Member]

    def spans(self, factory: SpanFactory) -> list[ReadableSpan]:
        """The batch span and its children."""
        record, times = self.record, self.record.times
        failed = record.outcome != "ok"
        root = factory.span(
            self.context,
            None,
            BATCH_SPAN,
            record.dispatched_ns,
            record.returned_ns,
            attributes=self._attributes(),
            links=[_member_link(member) for member in self.sampled[: factory.links_max]],
            status=Status(StatusCode.ERROR, record.outcome) if failed else None,
        )
        if times is None:
            return [root]
        borders = (
            ("dispatch", times.start_ns), ("assemble", times.assembled_ns), ("copy_in", times.copied_in_ns),
            ("forward", times.forward_ns), ("pool", times.pooled_ns), ("copy_out", times.copied_out_ns),
            ("return", record.returned_ns),
        )  # fmt: skip
        spans, at = [root], record.dispatched_ns
        for name, mark in borders:
            end = min(max(mark, at), record.returned_ns)
            spans.append(factory.child(self.context, name, at, end))
            at = end
        return spans

    def _attributes(self) -> dict[str, AttributeValue]:
        batch = self.record.batch
        attributes: dict[str, AttributeValue] = {
            semconv.BATCH_ID: batch.id,
            semconv.BATCH_SHAPE: batch.shape.value,
            semconv.BATCH_EDGE: batch.edge,
            semconv.BATCH_ROWS: batch.rows,
            semconv.BATCH_TOKENS: batch.tokens,
            semconv.BATCH_PADDED_TOKENS: batch.padded_tokens,
            semconv.BATCH_REQUESTS: len(self.record.members),
            semconv.BATCH_REQUESTS_SAMPLED: len(self.sampled),
            semconv.BATCH_ATTEMPT: batch.attempt,
            semconv.BATCH_OUTCOME: self.record.outcome,
            semconv.BATCH_PREDICTED_MS: self.record.predicted_ns / _NS_PER_MS,
        }
        if self.record.outcome != "ok":
            attributes[semconv.ERROR_TYPE] = self.record.outcome
        return attributes


def _member_link(member: Member) -> Link:
    assert isinstance(member.trace, SpanContext)
    return Link(
        member.trace,
        {
            semconv.LINK_FIRST_INDEX: member.first_index,
            semconv.LINK_ROWS: member.rows,
            semconv.LINK_TOKENS: member.tokens,
        },
    )


def _ride_link(ride: Ride) -> Link:
    assert isinstance(ride.trace, SpanContext)
    return Link(
        ride.trace,
        {semconv.BATCH_ID: ride.batch_id, semconv.BATCH_ROWS: ride.batch_rows, semconv.LINK_ROWS: ride.rows},
    )


def _queue_attributes(stages: Stages) -> dict[str, AttributeValue]:
    return {
        semconv.BUCKET: stages.bucket,
        semconv.TEXTS: stages.texts,
        semconv.TOKENS: stages.tokens,
        semconv.QUEUE_ITEMS: stages.waiting_items,
        semconv.QUEUE_TOKENS: stages.waiting_tokens,
        semconv.PREDICTED_MS: stages.predicted_ns / _NS_PER_MS,
    }


def _peer(peer: str) -> dict[str, AttributeValue]:
    # grpc writes "ipv4:10.0.0.1:50051", "ipv6:%5B::1%5D:50051" or "unix:path".
    family, _, rest = peer.partition(":")
    if family == "unix":
        return {semconv.NETWORK_PEER_ADDRESS: rest or "unix"}
    host, _, port = rest.replace("%5B", "").replace("%5D", "").rpartition(":")
    if family not in {"ipv4", "ipv6"} or not port.isdigit():
        return {}
    return {semconv.NETWORK_PEER_ADDRESS: host.strip("[]"), semconv.NETWORK_PEER_PORT: int(port)}
