"""What front ends and the engine process say to each other.

Decides the kinds of frames and the layout of their bodies. Must never know sockets, memory or what is done about a
frame. Both sides run one build: nothing here is a contract with another version.

    front end                        engine process
                  ◀── WELCOME        the model is ready: identity and device
                  ◀── LOAD           the load, often while there is work, and now and then without
    JUDGE         ──▶                would so many tokens be admitted? asked before much is tokenised
                  ◀── JUDGED         (or FAILED)
    EMBED         ──▶                token ids lie in a slot
                  ◀── DONE           vectors lie in that slot
                  ◀── FAILED         (also the answer to a call that was cancelled: the slot is free)
    CANCEL        ──▶
    STREAM        ──▶
                  ◀── FEED           wants the token ids of some texts
    PIECE         ──▶                they lie in a slot (or UNFED: they could not be made)
                  ◀── PORTION        some vectors lie in the stream's slot
    TAKEN         ──▶                they were read: the next may be written
                  ◀── ENDED
                  ◀── SCRAPE         wants the metrics of this process
    SCRAPED       ──▶
                  ◀── RECALL         wants what this process remembers of its calls
    RECALLED      ──▶
                  ◀── BROKEN         nothing more will run

    supervisor                       engine process, where there are several: WELCOME, LOAD and BROKEN as above, and
    SHOW_METRICS  ──▶                wants the metrics of this process, with the front ends' or without
    SHOW_PAGE     ──▶                wants the facts of the page for people
                  ◀── SHOWN
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

import orjson

from embedserve.engine.call import Call, Portion, Refused
from embedserve.frontends.failure import pack_failure, unpack_failure
from embedserve.frontends.marks import TRACE_BYTES, Traces
from embedserve.frontends.slots import Slot
from embedserve.model.tokenizer import Truncation
from embedserve.scheduling.item import Priority

__all__ = ["Order", "Piece", "pack_order", "pack_portion", "unpack_order", "unpack_portion"]

(
    WELCOME, LOAD, EMBED, DONE, FAILED, CANCEL, STREAM, FEED, PIECE, UNFED, PORTION, TAKEN, ENDED, BROKEN, JUDGE,
    JUDGED, SCRAPE, SCRAPED, RECALL, RECALLED, SHOW_METRICS, SHOW_PAGE, SHOWN,
) = range(23)  # fmt: skip
NO_SLOT: Final = Slot(0, 0)
UNSHOWN: Final = b"\0"
"""Begins a SHOWN that is why there is nothing to show."""

FEED_BODY: Final = Struct("<II")
"""First text, and the one after the last."""
DONE_BODY: Final = Struct("<II")
"""Floats in a vector, passes; the marks follow."""
_ORDER: Final = Struct("<QQ3IiBBBBqqqH")
_PIECE: Final = Struct("<QQ3I")
_PORTION: Final = Struct("<3I")
_TRUNCATIONS: Final = tuple(Truncation)


class Order(NamedTuple):
    """An EMBED or a STREAM, as the engine process reads it."""

    slot: Slot
    texts: int
    tokens: int
    """Token ids in the slot; of a stream, what its first piece is estimated to have."""
    prompt_tokens: int
    dimensions: int | None
    normalize: bool
    truncation: Truncation
    priority: Priority
    deadline_ns: int | None
    arrived_ns: int
    validated_ns: int
    tenant: str
    trace: object | None


def pack_order(call: Call, slot: Slot, tokens: int, prompt_tokens: int, traces: Traces) -> bytes:
    """The body of an EMBED or a STREAM."""
    tenant = call.tenant.encode()
    head = _ORDER.pack(
        slot.offset, slot.size, call.count, tokens, prompt_tokens,
        -1 if call.dimensions is None else call.dimensions,
        call.normalize, _TRUNCATIONS.index(call.truncation), call.priority, call.trace is not None,
        -1 if call.deadline_ns is None else call.deadline_ns,
        call.stages.arrived_ns, call.stages.validated_ns, len(tenant),
    )  # fmt: skip
    return head + tenant if call.trace is None else head + tenant + traces.pack(call.trace)


def unpack_order(body: bytes, traces: Traces) -> Order:
    """What ``pack_order`` was given."""
    (
        offset, size, texts, tokens, prompt_tokens, dimensions, normalize, truncation, priority, traced, deadline_ns,
        arrived_ns, validated_ns, tenant,
    ) = _ORDER.unpack_from(body)  # fmt: skip
    end = _ORDER.size + tenant
    return Order(
        slot=Slot(offset, size),
        texts=texts,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        dimensions=None if dimensions < 0 else dimensions,
        normalize=bool(normalize),
        truncation=_TRUNCATIONS[truncation],
        priority=Priority(priority),
        deadline_ns=None if deadline_ns < 0 else deadline_ns,
        arrived_ns=arrived_ns,
        validated_ns=validated_ns,
        tenant=body[_ORDER.size : end].decode() if tenant else "",
        trace=traces.unpack(body[end : end + TRACE_BYTES]) if traced else None,
    )


class Piece(NamedTuple):
    """Token ids of some texts of a stream, in a slot of their own."""

    slot: Slot
    texts: int
    tokens: int
    prompt_tokens: int

    def pack(self) -> bytes:
        """The body of a PIECE."""
        return _PIECE.pack(*self.slot, self.texts, self.tokens, self.prompt_tokens)

    @classmethod
    def unpack(cls, body: bytes) -> Piece:
        """What ``pack`` gave."""
        offset, size, texts, tokens, prompt_tokens = _PIECE.unpack(body)
        return cls(Slot(offset, size), texts, tokens, prompt_tokens)


def pack_portion(portion: Portion) -> bytes:
    """The body of a PORTION; its vectors lie in the stream's slot."""
    dimensions = 0 if portion.vectors is None else portion.vectors.shape[1]
    facts = (
        list(portion.indexes),
        list(portion.token_counts),
        list(portion.truncated),
        [(refused.index, pack_failure(refused.error).decode()) for refused in portion.refused],
    )
    return _PORTION.pack(len(portion.indexes), dimensions, portion.batch_size) + orjson.dumps(facts)


def unpack_portion(body: bytes) -> tuple[Portion, int]:
    """The portion without its vectors, and the floats in each."""
    _, dimensions, batch_size = _PORTION.unpack_from(body)
    indexes, token_counts, truncated, refused = orjson.loads(body[_PORTION.size :])
    portion = Portion(
        indexes=indexes,
        token_counts=token_counts,
        truncated=truncated,
        batch_size=batch_size,
        refused=[Refused(index, unpack_failure(error.encode())) for index, error in refused],
    )
    return portion, dimensions
