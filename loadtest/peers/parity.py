"""Nobody is timed on nonsense: each peer's vectors are compared before it is.

Decides what counts as right. A peer's vectors must be those of its own reference (embedserve's, or what the peer's
pooling gives on the same checkpoint, see ``Peer.reference``) with a cosine of at least ``COSINE_MIN`` for every text;
the distance to embedserve is shown beside it. Must never know how a peer is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.peers.peer import Peer, Vectors
from loadtest.peers.process import PeerProcess

__all__ = ["COSINE_MIN", "Parity", "check", "cosines"]

COSINE_MIN = 0.999
"""The mark of embedserve's own bf16; fp32 peers are above 0.99999."""
TEXTS_A_CALL = 8


@dataclass(frozen=True, slots=True)
class Parity:
    """How near a peer's vectors are."""

    peer: str
    reference: str
    texts: int
    cosine_min: float
    """Against its reference."""
    embedserve_min: float
    """Against embedserve: below 1 where the peer pools otherwise."""
    embedserve_median: float

    @property
    def met(self) -> bool:
        """Whether it may be timed."""
        return self.cosine_min >= COSINE_MIN

    def to_json(self) -> dict[str, Any]:
        """For a result file."""
        return {**asdict(self), "met": self.met}

    def line(self) -> str:
        """For the terminal."""
        verdict = "ok" if self.met else "WRONG: not timed"
        ours = f"{self.embedserve_min:>14.6f} {self.embedserve_median:>8.6f}"
        return f"  {self.peer:<32} {self.cosine_min:>10.6f} {ours}  {verdict}  ({self.reference})"


async def vectors_of(server: PeerProcess, texts: Sequence[str]) -> Vectors:
    """What a running peer gives, a few texts a call. Raises ``ConnectionError``."""
    target = server.target()
    try:
        await target.open()
        found = [await target.vectors(texts[at : at + TEXTS_A_CALL]) for at in range(0, len(texts), TEXTS_A_CALL)]
        return np.concatenate(found)
    finally:
        await target.close()


def check(peer: Peer, given: Vectors, ours: Vectors, texts: Sequence[str], checkpoint: Path) -> Parity:
    """Compare what a peer gave with its reference and with embedserve."""
    expected = peer.expected(texts, checkpoint)
    to_reference = cosines(given, ours if expected is None else expected)
    to_ours = cosines(given, ours)
    return Parity(
        peer=peer.label,
        reference=peer.reference,
        texts=len(texts),
        cosine_min=round(float(to_reference.min()), 7),
        embedserve_min=round(float(to_ours.min()), 7),
        embedserve_median=round(float(np.median(to_ours)), 7),
    )


def cosines(a: Vectors, b: Vectors) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of rows that belong together. Raises ``ValueError`` where the shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} vectors cannot be compared with {b.shape}")
    left, right = a.astype(np.float64), b.astype(np.float64)
    found = (left * right).sum(1) / np.maximum(np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1), 1e-30)
    return np.asarray(found)
