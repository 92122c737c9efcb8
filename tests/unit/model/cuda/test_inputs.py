"""The buffer of a pass: each field where its view is, and what fills it up."""

import numpy as np
import torch

from embedserve.model.backend import TokenBatch
from embedserve.model.cuda.inputs import FILLER, InputLayout
from embedserve.model.layout import packed

BATCH = TokenBatch(
    ids=np.array([5, 6, 7, 8, 9, 10], np.int32),
    offsets=np.array([0, 2, 6], np.int32),
    normalize=np.array([True, False]),
    pad_to=None,
    skip=np.array([1, 3], np.int32),
)


class TestWrite:
    def test_each_field_comes_back_and_the_rest_is_filler(self) -> None:
        layout = InputLayout(tokens=9, rows=3)
        buffer = torch.full((layout.size + 5,), 77, dtype=torch.int32)

        layout.write(
            buffer.numpy(),
            packed(BATCH, np.array([2, 4])),
            normalize=BATCH.normalize,
            skip=BATCH.skip,
            filler_id=1,
            filler_position=2,
        )
        fields = layout.views(buffer, skips=True)

        assert fields.ids.tolist() == [7, 8, 9, 10, 5, 6, 1, 1, 1]
        assert fields.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 2, 2]
        assert fields.segments.tolist() == [0, 0, 0, 0, 1, 1, FILLER, FILLER, FILLER]
        assert fields.cumulative.tolist() == [0, 4, 6, 6]
        assert fields.starts.tolist() == [0, 4, 0]
        assert fields.lengths.tolist() == [4, 2, 0]
        assert fields.skip is not None
        assert fields.skip.tolist() == [3, 1, 0]
        assert fields.normalize.tolist() == [0, 1, 0]
        assert buffer[layout.size :].tolist() == [77] * 5

    def test_a_batch_without_skip_skips_nothing(self) -> None:
        layout = InputLayout(tokens=6, rows=2)
        buffer = torch.full((layout.size,), 77, dtype=torch.int32)

        layout.write(
            buffer.numpy(),
            packed(BATCH, np.array([2, 4])),
            normalize=BATCH.normalize,
            skip=None,
            filler_id=0,
            filler_position=0,
        )

        skip = layout.views(buffer, skips=True).skip

        assert skip is not None
        assert skip.tolist() == [0, 0]
        assert layout.views(buffer, skips=False).skip is None

    def test_fields_begin_at_sixteen_bytes(self) -> None:
        layout = InputLayout(tokens=7, rows=5)
        buffer = torch.zeros(layout.size, dtype=torch.int32)
        fields = layout.views(buffer, skips=True)

        for field in (
            fields.ids,
            fields.positions,
            fields.segments,
            fields.cumulative,
            fields.lengths,
            fields.normalize,
        ):
            assert field.storage_offset() % 4 == 0
