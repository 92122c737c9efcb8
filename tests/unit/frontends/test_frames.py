"""What crosses between front ends and the engine process comes out as it went in."""

from __future__ import annotations

import numpy as np
import pytest

from embedserve.engine.call import Call, Portion, Refused
from embedserve.engine.stages import Boarding, Ride, Stages
from embedserve.errors import (
    DeadlineExpired,
    EngineFailed,
    EngineStalled,
    InvalidRequest,
    ItemFailed,
    ItemTooLarge,
    NonFiniteOutput,
    NotServing,
    Overloaded,
    Violation,
)
from embedserve.frontends.failure import pack_failure, unpack_failure
from embedserve.frontends.frames import Piece, pack_order, pack_portion, unpack_order, unpack_portion
from embedserve.frontends.marks import NoTraces, pack_marks, unpack_marks
from embedserve.frontends.memory import SharedMemory, create_memory, rows_bytes, tokens_bytes
from embedserve.frontends.slots import Slot
from embedserve.model.tokenizer import TokenizedTexts, Truncation
from embedserve.scheduling.item import Priority

FAILURES = [
    InvalidRequest([Violation("texts[3]", "has 900 tokens", "TEXT_TOO_LONG"), Violation("", "b", "B")]),
    Overloaded("shed", reason="QUEUE_FULL", policy="queue", retry_after_ms=70, figures={"items": 3.0}),
    Overloaded("never", reason="SUBMISSION_EXCEEDS_QUEUE", policy="too_large", retry_after_ms=None),
    NotServing("draining", reason="NOT_SERVING", retry_after_ms=1000),
    EngineStalled("silent", reason="ENGINE_STALLED", retry_after_ms=None),
    DeadlineExpired("late"),
    ItemFailed("poison"),
    ItemTooLarge("large"),
    NonFiniteOutput("nan"),
    EngineFailed("gone"),
]


class TestFailures:
    @pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
    def test_each_failure_crosses_as_what_it_is(self, error):
        back = unpack_failure(pack_failure(error))
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert vars(back) == vars(error)

    def test_what_nobody_raised_on_purpose_is_the_servers_fault(self):
        """Its own text was written for no caller; ``EngineFailed`` shows a caller an id only."""
        back = unpack_failure(pack_failure(TypeError("a secret")))
        assert isinstance(back, EngineFailed)
        assert "TypeError" in str(back)


class TestMarks:
    def test_marks_rides_and_boardings_come_back(self):
        sent = Stages(
            5, 6, 7, 8, 9, 10, 11, 12, 0, 2, 30, 64, 3, 4, 13,
            [Ride(1, 8, 64, 2, 10, 12), Ride(2, 1, 64, 1, 11, 13)],
            [Boarding(1, 8, 2, 9, bytes(range(25)))],
        )  # fmt: skip
        got = Stages(5, 6, 70, 80, texts=2)
        packed = pack_marks(sent, _Same())
        assert unpack_marks(packed + b"rest", got, _Same()) == len(packed)
        assert (got.admitted_ns, got.tokenized_ns) == (70, 80)
        sent.admitted_ns, sent.tokenized_ns = 70, 80
        assert got == sent

    def test_a_stream_is_admitted_and_tokenised_for_the_engine(self):
        got = Stages(5, 6)
        unpack_marks(pack_marks(Stages(5, 6, 7, 8), NoTraces()), got, NoTraces(), streamed=True)
        assert (got.admitted_ns, got.tokenized_ns) == (7, 8)


class _Same:
    def pack(self, trace):
        return trace

    def unpack(self, packed):
        return packed


class TestOrders:
    @pytest.mark.parametrize("trace", [None, bytes(range(25))])
    @pytest.mark.parametrize("deadline_ns", [None, 10**15])
    def test_a_call_crosses(self, trace, deadline_ns):
        call = Call(
            Stages(3, 4),
            texts=["a", "b"],
            truncation=Truncation.START,
            normalize=False,
            dimensions=8,
            deadline_ns=deadline_ns,
            priority=Priority.BULK,
            tenant="größe",
            trace=trace,
        )
        order = unpack_order(pack_order(call, Slot(4096, 8192), 77, 5, _Same()), _Same())
        assert order == (
            Slot(4096, 8192), 2, 77, 5, 8, False, Truncation.START, Priority.BULK, deadline_ns, 3, 4, "größe", trace
        )  # fmt: skip

    def test_a_piece_crosses(self):
        piece = Piece(Slot(4096, 4096), 3, 40, 2)
        assert Piece.unpack(piece.pack()) == piece

    def test_a_portion_crosses(self):
        portion = Portion([4, 7], np.zeros((2, 3), np.float32), [5, 6], [True, False], 9, [Refused(8, ItemFailed("x"))])
        back, dimensions = unpack_portion(pack_portion(portion))
        assert dimensions == 3
        assert (back.indexes, back.token_counts, back.truncated, back.batch_size) == ([4, 7], [5, 6], [True, False], 9)
        assert [(r.index, type(r.error), str(r.error)) for r in back.refused] == [(8, ItemFailed, "x")]


class TestMemory:
    def test_arrays_cross_and_are_the_readers_own(self):
        memory = SharedMemory(create_memory(1 << 16))
        tokenized = TokenizedTexts(
            np.arange(7, dtype=np.int32), np.array([3, 4], np.int32), np.array([True, False]), prompt_tokens=1
        )
        slot = Slot(4096, 4096)
        assert tokens_bytes(7, 2) <= slot.size
        memory.write_tokens(slot, tokenized)
        back = memory.read_tokens(slot, 7, 2, 1)
        vectors = np.random.default_rng(1).random((2, 16), np.float32)
        memory.write_rows(slot, vectors)
        memory.write_batch_sizes(slot, vectors.nbytes, [5, 6])
        assert rows_bytes(2, 16) == vectors.nbytes + 8
        assert back.ids.tolist() == list(range(7))  # not overwritten
        assert (back.lengths.tolist(), back.truncated.tolist(), back.prompt_tokens) == ([3, 4], [True, False], 1)
        assert (memory.read_rows(slot, 2, 16) == vectors).all()
        assert memory.read_batch_sizes(slot, vectors.nbytes, 2) == [5, 6]
        memory.close()

    def test_nothing_is_read_or_written_beyond_a_slot(self):
        memory = SharedMemory(create_memory(1 << 16))
        with pytest.raises(AssertionError):
            memory.write_rows(Slot(0, 4096), np.zeros((2, 1024), np.float32))
