"""Every span that there is, for the docs.

Decides their names and what is said of them. Must never know how one is made (``spans``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from embedserve.telemetry import semconv

__all__ = ["BATCH_SPAN", "COMPILE_SPAN", "SPANS", "SpanName"]

BATCH_SPAN: Final = "batch"
COMPILE_SPAN: Final = "compile"


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
    SpanName(COMPILE_SPAN, "INTERNAL", "its own trace", "The compiled model was made; it took over, or failed."),
)  # fmt: skip
"""In the order of a call."""
