"""Our bytes of a span are OpenTelemetry's own message, whatever the span holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from embedserve.telemetry.span_chain import Chain, ChainForm
from embedserve.telemetry.span_data import Child, LinkData, SharedAttributes, SpanData
from embedserve.telemetry.span_senders import ReadableSender
from embedserve.telemetry.span_tree import SpanTree
from embedserve.telemetry.span_wire import SpanEncoder

RESOURCE = Resource({"service.name": "t", "process.pid": 7}, "https://opentelemetry.io/schemas/1.44.0")
SCOPE = InstrumentationScope("embedserve", "1.2.3", "https://opentelemetry.io/schemas/1.44.0")

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=300)
values = st.one_of(
    texts, st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.floats(allow_nan=False),
    st.lists(texts, min_size=1, max_size=3),
)  # fmt: skip
attributes = st.dictionaries(
    st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1), values, max_size=6
)
ids = st.integers(1, (1 << 64) - 1)
shared_attributes = st.dictionaries(st.sampled_from(["A", "B", "C"]), values)
contexts = st.builds(
    lambda trace_id, span_id, remote: SpanContext(trace_id, span_id, remote, TraceFlags(1)),
    st.integers(1, (1 << 128) - 1), ids, st.booleans(),
)  # fmt: skip
links = st.builds(LinkData, contexts, attributes | st.builds(SharedAttributes, attributes))
spans = st.builds(
    SpanData,
    trace_id=st.integers(1, (1 << 128) - 1),
    span_id=ids,
    parent_id=st.integers(0, (1 << 64) - 1),
    parent_is_remote=st.booleans(),
    trace_state=st.sampled_from([None, TraceState([("vendor", "a:b"), ("x", "1")])]),
    name=texts,
    kind=st.sampled_from([1, 2]),
    begin_ns=st.integers(0, (1 << 63) - 1),
    end_ns=st.integers(0, (1 << 63) - 1),
    attributes=attributes,
    links=st.lists(links, max_size=3),
    dropped_links=st.integers(0, 1 << 20),
    error=st.none() | texts,
    shared=st.builds(SharedAttributes, shared_attributes),
)


children = st.tuples(
    texts, st.integers(0, (1 << 63) - 1), st.integers(0, (1 << 63) - 1), attributes, st.lists(links, max_size=3)
)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Of one to six spans, of which one may have attributes of its own and another one links."""
    names = draw(st.lists(texts, min_size=1, max_size=6))
    once = [name for name in names if names.count(name) == 1]
    attributed = draw(st.none() | st.sampled_from(once)) if once else None
    others = [name for name in once if name != attributed]
    linked = draw(st.none() | st.sampled_from(others)) if others else None
    shared = [draw(attributes | st.builds(SharedAttributes, attributes)) for _ in names]
    form = ChainForm(list(zip(names, shared, strict=True)), attributed=attributed, linked=linked)
    if draw(st.booleans()):
        form = form.after("before")
    borders = draw(st.lists(st.integers(0, (1 << 63) - 1), min_size=len(form.names) + 1, max_size=len(form.names) + 1))
    own = draw(attributes) if attributed is not None else {}
    return Chain(form, borders, own, draw(st.lists(links, max_size=3)) if linked is not None else [])


def alone(span: SpanData) -> SpanTree:
    """A tree that is one span."""
    return SpanTree(span, (), b"", 9)


def stock(*spans: SpanData) -> ExportTraceServiceRequest:
    """What OpenTelemetry's encoder makes of the same spans."""
    exporter = InMemorySpanExporter()
    sender = ReadableSender(exporter, RESOURCE, SCOPE)
    for span in spans:
        sender.add(alone(span))
    assert sender.send()
    readable = exporter.get_finished_spans()
    assert all(isinstance(span, ReadableSpan) for span in readable)
    return encode_spans(readable)


class TestSpanEncoder:
    @given(spans)
    def test_it_writes_what_the_library_would(self, span: SpanData) -> None:
        encoder = SpanEncoder(RESOURCE, SCOPE)
        request = ExportTraceServiceRequest.FromString(encoder.request([encoder.tree(alone(span))]))

        expected = stock(span)
        (theirs,) = expected.resource_spans[0].scope_spans[0].spans
        if not span.parent_id:  # it has no parent to be remote
            theirs.flags = 0x300 if span.parent_is_remote else 0x100
        theirs.dropped_links_count = span.dropped_links  # the SDK counts what it has dropped itself
        assert request == expected

    @given(spans, st.lists(children, max_size=4), st.integers(0, 2))
    def test_spans_below_another_are_what_they_are_one_by_one(
        self, root: SpanData, below: list[Child], links_max: int
    ) -> None:
        encoder = SpanEncoder(RESOURCE, SCOPE)
        tree = SpanTree(root, below, bytes(range(1, 8 * len(below) + 1)), links_max)
        each = tree.spans()

        together = ExportTraceServiceRequest.FromString(encoder.request([encoder.tree(tree)]))
        one_by_one = ExportTraceServiceRequest.FromString(encoder.request([encoder.tree(alone(span)) for span in each]))
        assert together == one_by_one
        assert [span.parent_id for span in each[1:]] == [root.span_id] * len(below)
        assert all(len(span.links) <= links_max for span in each[1:])

    @given(spans, chains(), st.integers(0, 2))
    def test_a_chain_is_what_the_library_makes_of_its_spans_one_by_one(
        self, root: SpanData, chain: Chain, links_max: int
    ) -> None:
        root = root._replace(parent_id=7, dropped_links=0)
        encoder = SpanEncoder(RESOURCE, SCOPE)
        tree = SpanTree(root, chain, bytes(range(1, 8 * len(chain) + 1)), links_max)
        links = len(root.links) + len(chain.links)
        assert tree.links == links

        for _ in range(2):  # the second time from a layout that is kept
            request = ExportTraceServiceRequest.FromString(encoder.request([encoder.tree(tree)]))
            expected = stock(*tree.spans())
            for ours, theirs in zip(tree.spans(), expected.resource_spans[0].scope_spans[0].spans, strict=True):
                theirs.dropped_links_count = ours.dropped_links  # the SDK counts what it has dropped itself
            assert request == expected

    def test_a_chain_whose_spans_are_small_or_huge_is_written_too(self) -> None:
        form = ChainForm([("a", {}), ("b", {}), ("c", {})], attributed="b", linked="c")
        root = SpanData(1, 2, 3, False, None, "n", 2, 0, 9, {}, [], 0, None)
        for size in (0, 1, 60, 100, 16_000):
            chain = Chain(form, (0, 1, 2, 3), {f"k{number}": 1 for number in range(size // 8)})
            tree = SpanTree(root, chain, bytes(range(24)), 9)
            encoder = SpanEncoder(RESOURCE, SCOPE)
            request = ExportTraceServiceRequest.FromString(encoder.request([encoder.tree(tree)]))
            assert request == stock(*tree.spans())

    def test_a_text_that_is_no_unicode_costs_its_own_characters_only(self) -> None:
        encoder = SpanEncoder(RESOURCE, SCOPE)
        span = SpanData(1, 2, 0, False, None, "n", 1, 0, 0, {"peer": "a\ud800b"}, [], 0, None)

        (written,) = (
            ExportTraceServiceRequest.FromString(encoder.request([encoder.tree(alone(span))]))
            .resource_spans[0].scope_spans[0].spans
        )  # fmt: skip
        assert written.attributes[0].value.string_value == "a?b"

    def test_words_that_callers_make_up_do_not_pile_up(self) -> None:
        encoder = SpanEncoder(RESOURCE, SCOPE)
        for number in range(10_000):
            encoder.span(SpanData(1, 2, 0, False, None, f"n{number}", 1, 0, 0, {"tenant": f"t{number}"}, [], 0, None))

        assert len(encoder._own._strings) <= 2048
        assert len(encoder._heads) <= 2048

    def test_a_request_holds_all_of_its_spans(self) -> None:
        encoder = SpanEncoder(RESOURCE, SCOPE)
        encoded = [
            encoder.tree(alone(SpanData(1, number + 1, 0, False, None, "n" * number, 1, 0, 0, {}, [], 0, None)))
            for number in range(300)
        ]

        (scope,) = ExportTraceServiceRequest.FromString(encoder.request(encoded)).resource_spans[0].scope_spans
        assert [len(span.name) for span in scope.spans] == list(range(300))


def test_an_exporter_that_refuses_is_heard() -> None:
    class Refusing(InMemorySpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.FAILURE

    sender = ReadableSender(Refusing(), RESOURCE, SCOPE)
    sender.add(SpanTree(SpanData(1, 2, 0, False, None, "n", 1, 0, 0, {}, [], 0, None), (), b"", 9))
    assert not sender.send()
