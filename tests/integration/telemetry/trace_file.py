"""Traces as an engineer finds them: a file of exported spans, and the steps from one to the next.

Nothing here knows the server: whatever is found was in the file.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Id = tuple[str, str]
"""Trace and span, in hex."""


@dataclass(frozen=True)
class ExportedSpan:
    """A span of the file."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    begin_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    links: tuple[Id, ...]
    is_error: bool
    resource: Mapping[str, Any]

    @property
    def process(self) -> str:
        """Which of several processes told of it; empty where there is one."""
        return str(self.resource.get("process.role", ""))

    @property
    def id(self) -> Id:
        return self.trace_id, self.span_id

    @property
    def took_ns(self) -> int:
        return self.end_ns - self.begin_ns


def write(request: ExportTraceServiceRequest, path: Path) -> None:
    """Append ``request`` to a file, one line of JSON each."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(MessageToDict(request)) + "\n")


class TraceFile:
    """What was exported."""

    def __init__(self, path: Path) -> None:
        """Read all of ``path``."""
        self.spans = list(_read(path))
        self.by_id = {span.id: span for span in self.spans}
        self._children: dict[Id, list[ExportedSpan]] = defaultdict(list)
        for span in sorted(self.spans, key=lambda span: span.begin_ns):
            self._children[span.trace_id, span.parent_id].append(span)

    @property
    def requests(self) -> list[ExportedSpan]:
        """Every request's own span."""
        return [span for span in self.spans if span.kind == "SPAN_KIND_SERVER"]

    def children(self, span: ExportedSpan) -> list[ExportedSpan]:
        """The stages of a request or a batch, in their order."""
        return self._children[span.id]

    def stage(self, span: ExportedSpan, name: str) -> ExportedSpan:
        """The one stage of that name."""
        (found,) = [child for child in self.children(span) if child.name == name]
        return found

    def slowest(self, *, after_ns: int) -> ExportedSpan:
        """The request that took longest, of those that came after a moment."""
        return max((span for span in self.requests if span.begin_ns > after_ns), key=lambda span: span.took_ns)

    def slow_stage(self, span: ExportedSpan) -> ExportedSpan:
        """Where a request or a batch has spent most of its time."""
        return max(self.children(span), key=lambda child: child.took_ns)

    def batches(self, request: ExportedSpan) -> list[ExportedSpan]:
        """The batches that a request rode in."""
        return [self.by_id[link] for child in self.children(request) for link in child.links]

    def members(self, batch: ExportedSpan) -> list[ExportedSpan]:
        """The requests that rode in a batch, as far as they were sampled."""
        return [self.by_id[link] for link in batch.links]


def _read(path: Path) -> Iterator[ExportedSpan]:
    for line in path.read_text(encoding="utf-8").splitlines():
        for resource in json.loads(line)["resourceSpans"]:
            told = {a["key"]: _value(a["value"]) for a in resource["resource"]["attributes"]}
            for scope in resource["scopeSpans"]:
                yield from (_span(span, told) for span in scope["spans"])


def _span(raw: Mapping[str, Any], resource: Mapping[str, Any]) -> ExportedSpan:
    return ExportedSpan(
        trace_id=_hex(raw["traceId"]),
        span_id=_hex(raw["spanId"]),
        parent_id=_hex(raw.get("parentSpanId", "")),
        name=raw["name"],
        kind=raw["kind"],
        begin_ns=int(raw["startTimeUnixNano"]),
        end_ns=int(raw["endTimeUnixNano"]),
        attributes={a["key"]: _value(a["value"]) for a in raw.get("attributes", ())},
        links=tuple((_hex(link["traceId"]), _hex(link["spanId"])) for link in raw.get("links", ())),
        is_error=raw.get("status", {}).get("code") == "STATUS_CODE_ERROR",
        resource=resource,
    )


def _hex(text: str) -> str:
    return base64.b64decode(text).hex()


def _value(value: Mapping[str, Any]) -> Any:
    ((kind, held),) = value.items()
    return int(held) if kind == "intValue" else held
