"""What every peer must tell: what to install, how to start it on a checkpoint, how to call it, what it should answer.

Decides the shape of a peer. It must never know a schedule, a statistic or another peer: ``environment.py`` installs,
``process.py`` runs, ``parity.py`` checks vectors, ``compare.py`` measures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from loadtest.target import Target

__all__ = ["HOST", "Launch", "Peer", "VectorTarget", "Vectors", "multiplies_bfloat16"]

Vectors = npt.NDArray[np.float32]
HOST = "127.0.0.1"
"""Peers listen for this machine only, where they let one choose."""


def multiplies_bfloat16() -> bool:
    """Whether this processor does, so that bfloat16 is faster than float32: embedserve's own rule for ``auto``."""
    import torch  # noqa: PLC0415 - a second, which a client process need not spend

    from embedserve.model.device import choose_dtype  # noqa: PLC0415

    return choose_dtype("auto", torch.device("cpu")) is torch.bfloat16


class VectorTarget(Target, Protocol):
    """A target that can also show its vectors, for the check before anything is timed."""

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """One vector a text, in order, float32 ``[texts, dimensions]``. Raises ``ConnectionError`` with the reason."""
        ...


@dataclass(frozen=True, slots=True)
class Launch:
    """How one server process is started."""

    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own, from which ``process.py`` takes what would change the server."""


class Peer(ABC):
    """One server that a user would pick, in one variant of its settings."""

    name: ClassVar[str]
    """As a user writes it, and the name of its folder in the cache."""
    about: ClassVar[str]
    """What it is, in one line."""
    requirements: ClassVar[Sequence[str]] = ()
    """What ``pip install`` is given, beside ``constraints.txt``. Empty: it runs in our own environment."""
    variants: ClassVar[Sequence[str]]
    """Settings that were tried, the fastest one that answers rightly first."""

    def __init__(self, variant: str = "") -> None:
        """``variant`` is one of ``variants``; empty means the first. Raises ``ValueError`` with those there are."""
        if variant and variant not in self.variants:
            raise ValueError(f"{self.name} has no variant {variant!r}; it has {', '.join(self.variants)}")
        self.variant = variant or self.variants[0]

    @property
    def label(self) -> str:
        """What tables call it: the name, and the variant where it is not the default."""
        return self.name if self.variant == self.variants[0] else f"{self.name}:{self.variant}"

    @property
    def reference(self) -> str:
        """What its vectors are compared with before it is timed."""
        return "embedserve"

    def prepare(self, checkpoint: Path, folder: Path, python: Path) -> Path:
        """The checkpoint in the form that this peer loads rightly.

        ``folder`` is its own place for copies, ``python`` its environment's interpreter. Raises ``RuntimeError``.
        """
        del folder, python
        return checkpoint

    def expected(self, texts: Sequence[str], checkpoint: Path) -> Vectors | None:
        """What it gives for ``texts`` if it loaded the checkpoint; ``None`` where that is what embedserve gives."""
        del texts, checkpoint
        return None

    @abstractmethod
    def launch(self, python: Path, model: Path, port: int) -> Launch:
        """Start it with its environment's ``python``, on a model that ``prepare`` made, at ``HOST:port``."""

    @abstractmethod
    def target(self, address: str, model: Path) -> VectorTarget:
        """A client for the running peer. It can be pickled before it is opened: client processes are given it."""
