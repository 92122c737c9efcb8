"""The table of states: what may follow what, what is accepted, what the process returns."""

from __future__ import annotations

import itertools

import pytest

from embedserve.errors import InvariantBroken
from embedserve.lifecycle import ExitCode, Lifecycle, State

LIVES = {
    "a whole life": ([State.WARMING, State.SERVING, State.DRAINING, State.STOPPED], ExitCode.OK),
    "stopped while warming": ([State.WARMING, State.DRAINING, State.STOPPED], ExitCode.OK),
    "stopped while starting": ([State.DRAINING, State.STOPPED], ExitCode.OK),
    "failed to start": ([State.FAILED], ExitCode.START_FAILED),
    "failed to warm up": ([State.WARMING, State.FAILED], ExitCode.START_FAILED),
    "failed while serving": ([State.WARMING, State.SERVING, State.FAILED], ExitCode.BROKEN),
    "stalled and well again": (
        [State.WARMING, State.SERVING, State.STALLED, State.SERVING, State.DRAINING, State.STOPPED],
        ExitCode.OK,
    ),
    "stopped while stalled": (
        [State.WARMING, State.SERVING, State.STALLED, State.DRAINING, State.STOPPED],
        ExitCode.OK,
    ),
    "failed while stalled": ([State.WARMING, State.SERVING, State.STALLED, State.FAILED], ExitCode.BROKEN),
    "failed while draining": ([State.WARMING, State.SERVING, State.DRAINING, State.FAILED], ExitCode.BROKEN),
}
LEGAL = {
    (State.STARTING, State.WARMING),
    (State.STARTING, State.DRAINING),
    (State.STARTING, State.FAILED),
    (State.WARMING, State.SERVING),
    (State.WARMING, State.DRAINING),
    (State.WARMING, State.FAILED),
    (State.SERVING, State.STALLED),
    (State.SERVING, State.DRAINING),
    (State.SERVING, State.FAILED),
    (State.STALLED, State.SERVING),
    (State.STALLED, State.DRAINING),
    (State.STALLED, State.FAILED),
    (State.DRAINING, State.STOPPED),
    (State.DRAINING, State.FAILED),
}
PATH_TO = {
    State.STARTING: [],
    State.WARMING: [State.WARMING],
    State.SERVING: [State.WARMING, State.SERVING],
    State.STALLED: [State.WARMING, State.SERVING, State.STALLED],
    State.DRAINING: [State.WARMING, State.SERVING, State.DRAINING],
    State.STOPPED: [State.WARMING, State.SERVING, State.DRAINING, State.STOPPED],
    State.FAILED: [State.FAILED],
}


def at(state: State) -> Lifecycle:
    life = Lifecycle()
    for step in PATH_TO[state]:
        life.to(step)
    return life


class TestSteps:
    """Only the steps of the table can be taken."""

    @pytest.mark.parametrize(("before", "after"), sorted(itertools.product(State, State), key=str))
    def test_a_step_is_taken_or_refused_and_then_changes_nothing(self, before: State, after: State) -> None:
        life, heard = at(before), []
        life.listen(heard.append)
        if (before, after) in LEGAL:
            life.to(after)
            assert (life.state, heard) == (after, [after])
        else:
            with pytest.raises(InvariantBroken, match=f"{before.value} to {after.value}"):
                life.to(after)
            assert (life.state, heard) == (before, [])


class TestMeaning:
    """What a state means to those outside."""

    @pytest.mark.parametrize(("steps", "code"), LIVES.values(), ids=LIVES.keys())
    def test_the_exit_code_tells_a_failed_start_from_a_broken_invariant(self, steps: list[State], code: int) -> None:
        life = Lifecycle()
        for step in steps:
            life.to(step)

        assert life.exit_code == code

    @pytest.mark.parametrize("state", State)
    def test_calls_are_accepted_in_serving_only(self, state: State) -> None:
        assert at(state).accepting == (state is State.SERVING)

    @pytest.mark.parametrize("state", State)
    def test_only_a_failed_process_is_not_alive(self, state: State) -> None:
        assert at(state).alive == (state is not State.FAILED)
