"""Time that passes share counts once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedserve.engine.device_time import ENDED_KEPT, DeviceTime


class TestSharedTime:
    def test_passes_one_after_another_share_nothing(self) -> None:
        time = DeviceTime()
        assert [time.shared_ns(0, 10), time.shared_ns(10, 25), time.shared_ns(40, 50)] == [0, 0, 0]

    def test_the_next_one_begins_beside_the_end_of_the_first(self) -> None:
        time = DeviceTime()
        time.shared_ns(0, 10)
        assert time.shared_ns(7, 30) == 3

    def test_a_short_one_ends_before_the_one_that_began_earlier(self) -> None:
        time = DeviceTime()
        assert time.shared_ns(20, 30) == 0
        assert time.shared_ns(32, 35) == 0
        assert time.shared_ns(0, 100) == 13

    @given(
        st.lists(
            st.tuples(st.integers(0, 1000), st.integers(1, 100)).map(lambda pass_: (pass_[0], sum(pass_))),
            max_size=ENDED_KEPT,
        )
    )
    def test_all_passes_together_have_the_time_in_which_any_was_at_work(self, passes: list[tuple[int, int]]) -> None:
        time = DeviceTime()
        own = sum(end - begin - time.shared_ns(begin, end) for begin, end in sorted(passes, key=lambda p: p[1]))
        assert own == len({instant for begin, end in passes for instant in range(begin, end)})
