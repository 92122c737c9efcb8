"""The stretches of a call's life, out of the marks that were set along it.

Decides what a stage is called and that stages leave no gap. Must never know spans or metrics: both are made of these.
"""

from __future__ import annotations

from typing import Final

from embedserve.engine.stages import Stages

__all__ = ["ADMIT_EXACT", "Segment", "segments"]

Segment = tuple[str, int, int]
"""Stage, begin and end; monotonic nanoseconds."""

ADMIT_EXACT: Final = "admit_exact"
"""The second half of admission, on real tokens; shown as ``admit``."""
_NEXT: Final = ("validate", "admit", "tokenize", ADMIT_EXACT, "queue", "assemble", "forward", "respond")


def segments(stages: Stages, ended_ns: int, *, answered: bool) -> list[Segment]:
    """The stages that a call went through, without gaps, from its arrival to ``ended_ns``.

    A mark that was never set is left out. The last segment is the stage in which the call ended: ``respond`` when it
    was ``answered``, otherwise whatever follows the last mark that was reached.
    """
    at = stages.arrived_ns
    found: list[Segment] = []
    reached = 0
    marks = (
        stages.validated_ns, stages.admitted_ns, stages.tokenized_ns, stages.queued_ns, stages.dequeued_ns,
        stages.assembled_ns, stages.computed_ns,
    )  # fmt: skip
    for index, mark in enumerate(marks):
        if mark:
            # Windows of a stream overlap: a later window's mark may lie before an earlier window's next one.
            end = min(max(mark, at), ended_ns)
            found.append((_NEXT[index], at, end))
            at = end
            reached = index + 1
    found.append(("respond" if answered else _NEXT[reached], at, ended_ns))
    return found
