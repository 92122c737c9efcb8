"""The stretches of a call's life, out of the marks that were set along it.

Decides what a stage is called and that stages leave no gap. Must never know spans or metrics: both are made of these.
"""

from __future__ import annotations

from typing import Final

from embedserve.engine.stages import Stages

__all__ = ["ADMIT_EXACT", "ORDER", "Marks", "Segment", "marks_of", "segments", "segments_between"]

Segment = tuple[str, int, int]
"""Stage, begin and end; monotonic nanoseconds."""
Marks = tuple[int, int, int, int, int, int, int, int]
"""Arrival, and then the marks of ``Stages`` up to ``computed_ns``; 0 for one that was never reached."""

ADMIT_EXACT: Final = "admit_exact"
"""The second half of admission, on real tokens; shown as ``admit``."""
ORDER: Final = ("validate", "admit", "tokenize", ADMIT_EXACT, "queue", "assemble", "forward", "respond")


def marks_of(stages: Stages) -> Marks:
    """The borders of ``stages``, as they are now: an engine may set some after the call has ended."""
    return (
        stages.arrived_ns, stages.validated_ns, stages.admitted_ns, stages.tokenized_ns, stages.queued_ns,
        stages.dequeued_ns, stages.assembled_ns, stages.computed_ns,
    )  # fmt: skip


def segments(stages: Stages, ended_ns: int, *, answered: bool) -> list[Segment]:
    """The stages that a call went through, without gaps, from its arrival to ``ended_ns``.

    A mark that was never set is left out. The last segment is the stage in which the call ended: ``respond`` when it
    was ``answered``, otherwise whatever follows the last mark that was reached.
    """
    return segments_between(marks_of(stages), ended_ns, answered=answered)


def segments_between(marks: Marks, ended_ns: int, *, answered: bool) -> list[Segment]:
    """``segments`` of marks that were taken before."""
    at = marks[0]
    found: list[Segment] = []
    reached = 0
    for index in range(1, len(marks)):
        mark = marks[index]
        if mark:
            # Windows of a stream overlap: a later window's mark may lie before an earlier window's next one.
            end = mark if at <= mark <= ended_ns else min(max(mark, at), ended_ns)
            found.append((ORDER[index - 1], at, end))
            at = end
            reached = index
    found.append(("respond" if answered else ORDER[reached], at, ended_ns))
    return found
