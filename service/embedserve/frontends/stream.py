"""A stream at its front end: token ids out as they are asked for, portions in as their batches finish.

Decides when a portion counts as taken: when its reader has come back for the next. Must never know the engine's window,
a transport or policies.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING

from embedserve.engine.call import Call, Portion
from embedserve.engine.intake import CHARS_PER_TOKEN_GUESS, SPECIAL_TOKENS
from embedserve.errors import EmbedServeError, Overloaded
from embedserve.frontends import frames
from embedserve.frontends.failure import pack_failure
from embedserve.frontends.frames import Piece, unpack_portion
from embedserve.frontends.marks import unpack_marks
from embedserve.frontends.memory import tokens_bytes
from embedserve.frontends.slots import Slot

if TYPE_CHECKING:
    from embedserve.frontends.engines import EnginePeer
    from embedserve.frontends.remote import RemoteEngine

__all__ = ["RemoteStream", "estimate_chars", "estimate_tokens"]


def estimate_chars(call: Call, items: int | None = None) -> int:
    """Characters of the first ``items`` texts, or of all, their prompts included; 0 for token ids."""
    texts = (call.texts or ()) if items is None else (call.texts or ())[:items]
    return sum(map(len, texts)) + len(call.prompt) * len(texts)


def estimate_tokens(call: Call, items: int | None = None) -> int:
    """About how many tokens the first ``items`` texts have, or all."""
    items = call.count if items is None else items
    if call.tokens is not None:
        return int(call.tokens.lengths[:items].sum())
    return int(estimate_chars(call, items) / CHARS_PER_TOKEN_GUESS) + SPECIAL_TOKENS * items


class RemoteStream:
    """One stream that the engine process works on."""

    def __init__(
        self,
        remote: RemoteEngine,
        engine: EnginePeer,
        call_id: int,
        call: Call,
        slot: Slot,
    ) -> None:
        """``slot`` of the memory shared with ``engine`` is where portions come."""
        self.call = call
        self.slot = slot
        self._remote = remote
        self._id = call_id
        self._send = engine.send
        self._memory = engine.memory
        self._slots = engine.slots
        self._piece: Slot | None = None
        """Ids that the engine process may not have copied yet."""
        self._feeding: asyncio.Task[None] | None = None
        self._outbox: deque[Portion] = deque()
        self._wake = asyncio.Event()
        self._error: EmbedServeError | None = None
        self._ended = False

    def take(self, kind: int, body: bytes) -> None:
        """A frame of the engine process."""
        if kind == frames.FEED:
            self._give_piece_back()  # it asks for more, so it has what it was given
            first, stop = frames.FEED_BODY.unpack(body)
            self._feeding = asyncio.get_running_loop().create_task(self._feed(first, stop))
        elif kind == frames.PORTION:
            portion, dimensions = unpack_portion(body)
            if dimensions:
                vectors = self._memory.read_rows(self.slot, len(portion.indexes), dimensions)
                portion = replace(portion, vectors=vectors)
            self._outbox.append(portion)
            self._wake.set()
        elif kind == frames.ENDED:
            unpack_marks(body, self.call.stages, self._remote.traces, streamed=True)
            self._ended = True
            self._wake.set()

    def end(self, error: EmbedServeError) -> None:
        """The stream as a whole has failed."""
        self._error = self._error or error
        self._wake.set()

    async def _feed(self, first: int, stop: int) -> None:
        try:
            tokenized = await self._remote.tokenize(self.call, first, stop)
            tokens, texts = len(tokenized.ids), len(tokenized.lengths)
            slot = self._slots.take(tokens_bytes(tokens, texts))
        except Exception as error:  # noqa: BLE001 - it crosses, and ends the stream there
            self._send(frames.UNFED, self._id, pack_failure(error))
            return
        if slot is None:
            self._send(frames.UNFED, self._id, pack_failure(self._no_room()))
            return
        self._memory.write_tokens(slot, tokenized)
        self._piece = slot
        self._send(frames.PIECE, self._id, Piece(slot, texts, tokens, tokenized.prompt_tokens).pack())

    def _no_room(self) -> Overloaded:
        return self._remote.refusal(
            "memory",
            "FRONTEND_MEMORY_FULL",
            "a piece of the stream has no room beside the calls in flight (server.frontend_memory_bytes)",
        )

    async def portions(self) -> AsyncGenerator[Portion, None]:
        """Each portion as it comes; raises what the stream ended with."""
        while True:
            while self._outbox and self._error is None:
                yield self._outbox.popleft()
                self._send(frames.TAKEN, self._id)
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()

    def close(self) -> None:
        """Nobody reads any more. The engine process copies a piece's ids in the order of frames, before a CANCEL."""
        if self._feeding is not None:
            self._feeding.cancel()

    def release(self) -> None:
        """The engine process is done with the stream: its slots are free."""
        self._give_piece_back()
        self._slots.give(self.slot)

    def _give_piece_back(self) -> None:
        if self._piece is not None:
            self._slots.give(self._piece)
            self._piece = None
