"""Calls of a front end that the engine process works on, and the slots that they hold.

Decides when a slot is free: when the engine process has said that it is done with the call, whoever has gone meanwhile.
Must never know tokenizers, the load or gRPC.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from dataclasses import dataclass
from typing import Any, Protocol

from embedserve.engine.call import Call, Embedded
from embedserve.engine.stages import Stages
from embedserve.engine.wall import sentence
from embedserve.errors import EmbedServeError, EngineFailed
from embedserve.frontends import frames
from embedserve.frontends.failure import unpack_failure
from embedserve.frontends.frames import pack_order
from embedserve.frontends.marks import Traces, unpack_marks
from embedserve.frontends.memory import SharedMemory
from embedserve.frontends.slots import Slot, SlotAllocator
from embedserve.frontends.stream import RemoteStream
from embedserve.model.tokenizer import TokenizedTexts

__all__ = ["RemoteCalls", "Sender"]


class Sender(Protocol):
    """``EnginePeer.send``."""

    def __call__(self, kind: int, call_id: int, body: bytes = b"") -> None:
        """Send a frame."""


@dataclass(slots=True)
class _Waiting:
    """A whole request that is with the engine process."""

    call: Call
    tokenized: TokenizedTexts
    slot: Slot
    slots: SlotAllocator
    future: asyncio.Future[Embedded]

    def release(self) -> None:
        """The engine process is done with it."""
        self.slots.give(self.slot)


class RemoteCalls:
    """What is with the engine process. Lives on one event loop."""

    def __init__(self, send: Sender, memory: SharedMemory, slots: SlotAllocator, traces: Traces) -> None:
        """``slots`` are those of ``memory``."""
        self._send = send
        self._memory = memory
        self._slots = slots
        self._traces = traces
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._streams: dict[int, RemoteStream] = {}
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._left: dict[int, _Waiting | RemoteStream] = {}
        """Calls whose caller has gone: their slots are not free until the engine process has let go of them."""

    def new_id(self) -> int:
        """A number for one call."""
        return next(self._ids)

    async def embed(self, call: Call, tokenized: TokenizedTexts, slot: Slot) -> Embedded:
        """Let the engine process embed; on cancellation it is told so. Raises what it says."""
        self._memory.write_tokens(slot, tokenized)
        call_id = next(self._ids)
        future: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()
        waiting = self._waiting[call_id] = _Waiting(call, tokenized, slot, self._slots, future)
        order = pack_order(call, slot, len(tokenized.ids), tokenized.prompt_tokens, self._traces)
        self._send(frames.EMBED, call_id, order)
        try:
            return await future
        except asyncio.CancelledError:
            if self._waiting.pop(call_id, None) is not None:
                self._leave(call_id, waiting)
            raise

    def open_stream(self, call_id: int, stream: RemoteStream, first_piece_tokens: int) -> None:
        """Let the engine process begin with a stream."""
        self._streams[call_id] = stream
        order = pack_order(stream.call, stream.slot, first_piece_tokens, 0, self._traces)
        self._send(frames.STREAM, call_id, order)

    def close_stream(self, call_id: int, stream: RemoteStream) -> None:
        """Its reader has gone, or has all of it."""
        stream.close()
        if self._streams.pop(call_id, None) is not None:
            self._leave(call_id, stream)

    async def ask(self, call: Call, tokens: int) -> None:
        """Ask whether so many tokens would be admitted. Raises what the engine process says."""
        call_id = next(self._ids)
        asked = self._asked[call_id] = asyncio.get_running_loop().create_future()
        self._send(frames.JUDGE, call_id, pack_order(call, frames.NO_SLOT, tokens, 0, self._traces))
        try:
            await asked
        finally:
            self._asked.pop(call_id, None)

    def _leave(self, call_id: int, call: _Waiting | RemoteStream) -> None:
        """The caller has gone, and the engine process works on its call still."""
        self._left[call_id] = call
        self._send(frames.CANCEL, call_id)

    def take(self, kind: int, call_id: int, body: bytes) -> None:
        """A frame of the engine process on one call."""
        if kind == frames.DONE:
            self._done(call_id, body)
        elif kind == frames.FAILED:
            self._failed(call_id, body)
        elif kind == frames.JUDGED:
            if (asked := self._asked.pop(call_id, None)) is not None and not asked.done():
                asked.set_result(None)
        elif (stream := self._streams.get(call_id)) is not None:
            stream.take(kind, body)
            if kind == frames.ENDED:
                self._streams.pop(call_id).release()
        elif kind == frames.ENDED:  # its reader left while this was on its way
            self._left.pop(call_id).release()

    def fail(self, error: EmbedServeError) -> None:
        """Nothing will come any more: everybody who waits is told."""
        futures: list[asyncio.Future[Any]] = [waiting.future for waiting in self._waiting.values()]
        for future in (*futures, *self._asked.values()):
            if not future.done():
                future.set_exception(error)
        for stream in self._streams.values():
            stream.end(error)

    def _done(self, call_id: int, body: bytes) -> None:
        waiting = self._waiting.get(call_id)
        if waiting is None:
            self._left.pop(call_id).release()
            return
        dimensions, batches = frames.DONE_BODY.unpack_from(body)
        tokenized = waiting.tokenized
        texts = len(tokenized.lengths)
        unpack_marks(body[frames.DONE_BODY.size :], waiting.call.stages, self._traces)
        vectors = self._memory.read_rows(waiting.slot, texts, dimensions)
        batch_sizes = self._memory.read_batch_sizes(waiting.slot, vectors.nbytes, texts)
        del self._waiting[call_id]  # only now: a frame that cannot be read ends the link, which fails who waits still
        waiting.release()
        if not waiting.future.done():
            waiting.future.set_result(
                Embedded(
                    vectors=vectors,
                    token_counts=tokenized.lengths.tolist(),
                    truncated=tokenized.truncated.tolist(),
                    batch_sizes=batch_sizes,
                    tokens=len(tokenized.ids),
                    batches=batches,
                )
            )

    def _failed(self, call_id: int, body: bytes) -> None:
        waiting, stream = self._waiting.pop(call_id, None), self._streams.pop(call_id, None)
        if (asked := self._asked.pop(call_id, None)) is not None:
            if not asked.done():
                asked.set_exception(self._failure(body, Stages(0)))
        elif waiting is not None:
            waiting.release()
            if not waiting.future.done():
                waiting.future.set_exception(self._failure(body, waiting.call.stages))
        elif stream is not None:
            stream.release()
            stream.end(self._failure(body, stream.call.stages, streamed=True))
        elif (left := self._left.pop(call_id, None)) is not None:  # else: who asked whether, and has gone
            left.release()

    def _failure(self, body: bytes, stages: Stages, *, streamed: bool = False) -> EmbedServeError:
        """What the engine process says of a call; its caller is answered whether that can be read or not.

        It says nothing of a call whose task was cancelled, as all are where its event loop ends under them.
        """
        if not body:
            return EngineFailed("the engine process has ended the call")
        try:
            at = unpack_marks(body, stages, self._traces, streamed=streamed)
            return unpack_failure(body[at:])
        except (struct.error, LookupError, TypeError, ValueError) as broken:
            return EngineFailed(f"the engine process says of a failure what cannot be read: {sentence(broken)}")
