"""How a pass is dealt out to the cores, and what becomes of errors."""

import threading

import numpy as np
import pytest
import torch

from embedserve.model.lanes import SPLIT_TOKENS, Lanes


@pytest.fixture
def lanes():
    return Lanes(2)


class TestShares:
    def test_each_row_is_in_one_lane(self):
        lengths = np.random.default_rng(3).integers(1, 256, size=37)

        shares = Lanes(3).shares(lengths)

        assert len(shares) == 3
        assert sorted(np.concatenate(shares).tolist()) == list(range(37))

    @pytest.mark.parametrize("count", [2, 3, 4])
    def test_lanes_have_nearly_as_many_tokens(self, count):
        """They differ by less than the longest row."""
        for seed in range(50):
            lengths = np.random.default_rng(seed).integers(1, 256, size=40)

            tokens = [int(lengths[rows].sum()) for rows in Lanes(count).shares(lengths)]

            assert max(tokens) - min(tokens) <= lengths.max()

    def test_a_small_pass_stays_in_one(self, lanes):
        assert [rows.tolist() for rows in lanes.shares(np.array([64, 64]))] == [[0, 1]]
        assert len(lanes.shares(np.array([SPLIT_TOKENS - 1, 1]))) == 2

    def test_a_single_row_cannot_be_dealt_out(self, lanes):
        assert len(lanes.shares(np.array([4_000]))) == 1

    def test_one_core_has_one_lane(self):
        assert len(Lanes(1).shares(np.full(100, 100))) == 1


class TestRun:
    def test_all_run_at_once(self, lanes):
        """Each waits for the other."""
        meeting = threading.Barrier(2, timeout=10)

        assert sorted(lanes.run([meeting.wait, meeting.wait])) == [0, 1]

    def test_the_threads_end_with_the_lanes(self):
        before = set(threading.enumerate())
        lanes = Lanes(3)
        lanes.run([lambda: None] * 3)
        begun = set(threading.enumerate()) - before
        del lanes

        assert begun
        for thread in begun:
            thread.join(10)
            assert not thread.is_alive()

    @pytest.mark.parametrize("place", [0, 1])
    def test_an_error_comes_out_when_all_have_ended(self, lanes, place):
        ended = []

        def good():
            ended.append(True)

        def bad():
            raise ValueError("poison")

        with pytest.raises(ValueError, match="poison"):
            lanes.run([bad, good] if place == 0 else [good, bad])
        assert ended == [True]

    def test_each_computes_alone(self, lanes):
        assert lanes.run([torch.get_num_threads, torch.get_num_threads]) == [1, 1]

    def test_one_long_row_has_all_cores(self, lanes):
        with lanes.all_on_one(SPLIT_TOKENS):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
