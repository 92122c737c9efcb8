"""Real English text that is on any machine: docstrings of the standard library and licences of installed packages."""

from __future__ import annotations

import ast
import importlib.metadata
import random
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

__all__ = ["SHORT", "real_texts"]

MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "concurrent",
    "decimal",
    "email",
    "fractions",
    "http",
    "inspect",
    "json",
)
MODULES += ("logging", "multiprocessing", "pathlib", "pickle", "random", "statistics", "tarfile", "threading", "typing")
SHORT = ((1, 4), (4, 12), (12, 40))
"""Words in a short text."""
LENGTHS_WORDS = (*SHORT, *SHORT, (4, 12), (12, 40), (40, 100), (40, 100), (100, 180), (180, 400))
"""Words in a text, one range after the other: mostly short, as real traffic is. English has about 1.4 tokens a word, so
that the last two ranges lie beyond 128 and 256 tokens."""


@cache
def _paragraphs() -> tuple[str, ...]:
    found: list[str] = []
    library = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        place = library / module
        files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        for file in files:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    found.append(ast.get_docstring(node) or "")
    for name in ("numpy", "torch", "transformers", "grpcio", "pytest"):
        for file in importlib.metadata.files(name) or ():
            if "LICENSE" in file.name.upper() and file.suffix in ("", ".txt"):
                found += file.read_text(encoding="utf-8").split("\n\n")[:200]
                break
    return tuple(text for text in found if len(text.split()) > 2)


def real_texts(n: int, seed: int, lengths_words: Sequence[tuple[int, int]] = LENGTHS_WORDS) -> list[str]:
    """``n`` texts, the same for the same ``seed`` on the same machine, in equal shares of each range of lengths."""
    rng = random.Random(seed)
    paragraphs = _paragraphs()
    texts = []
    for index in range(n):
        words_min, words_max = lengths_words[index % len(lengths_words)]
        wanted = rng.randint(words_min, words_max)
        text = rng.choice(paragraphs)
        while len(text.split()) < wanted:
            text += "\n\n" + rng.choice(paragraphs)
        # Cut after the wanted word and keep the text's own spaces and line ends.
        place = 0
        for word in text.split()[:wanted]:
            place = text.index(word, place) + len(word)
        texts.append(text[:place])
    rng.shuffle(texts)
    return texts
