"""The texts of a scenario: the same ones for the same settings and seed, whoever sends them to whatever server.

Decides words and lengths. Must never know who sends them or how long a token is: ``words.txt`` holds the 1,500 most
frequent words of BERT's vocabulary, one token each there, so that a text of n words is n + 2 tokens to such a model.
"""

from __future__ import annotations

import ast
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from functools import cache
from math import exp, log
from pathlib import Path
from random import Random

from loadtest.scenario import Scenario, Texts

__all__ = ["calls_of", "texts_of_scenario"]

WORDS = Path(__file__).resolve().parent / "words.txt"
MODULES: tuple[str, ...] = (
    *("argparse", "asyncio", "collections", "concurrent", "decimal", "email", "fractions", "http", "inspect", "json"),
    *("logging", "multiprocessing", "pathlib", "pickle", "random", "statistics", "tarfile", "threading", "typing"),
)
LICENCES = ("numpy", "torch", "transformers", "grpcio", "protobuf", "pydantic")
PARAGRAPHS_A_LICENCE = 200
"""One package's licence holds those of forty others: it may not be most of the corpus."""
DOC_WORDS = (12, 160)
"""Shorter paragraphs are headings and fragments; mean 50 tokens with MiniLM, half of them under 40, 0.3 % over 256."""


def calls_of(scenario: Scenario) -> list[tuple[str, ...]]:
    """The calls of a scenario, each a tuple of ``per_call`` texts; they are sent in this order and then again."""
    texts = texts_of_scenario(scenario.texts, scenario.seed)
    size = scenario.texts.per_call
    return [tuple(texts[at : at + size]) for at in range(0, len(texts), size)]


def texts_of_scenario(settings: Texts, seed: int) -> list[str]:
    """``distinct`` texts, rounded up to whole calls."""
    count = -(-settings.distinct // settings.per_call) * settings.per_call
    random = Random(f"{seed} {settings.kind}")
    if settings.kind == "docs":
        paragraphs = _paragraphs()
        return [paragraphs[random.randrange(len(paragraphs))] for _ in range(count)]
    words = _words()
    return [" ".join(random.choices(words, k=length)) for length in _lengths(settings, count, random)]


def _lengths(settings: Texts, count: int, random: Random) -> Iterator[int]:
    fewest, most = settings.words
    for _ in range(count):
        if settings.spread == "log":
            # Each whole number is as likely as its own stretch of the logarithm is wide.
            yield min(most, int(exp(random.uniform(log(fewest), log(most + 1)))))
        else:
            yield random.randint(fewest, most)


@cache
def _words() -> tuple[str, ...]:
    return tuple(WORDS.read_text(encoding="ascii").split())


@cache
def _paragraphs() -> tuple[str, ...]:
    found: list[str] = []
    for text in (*_docstrings(), *_licences()):
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            if DOC_WORDS[0] <= len(words) <= DOC_WORDS[1]:
                found.append(" ".join(words))
    # Each once, in the order found: which files there are decides, not the order of a set.
    return tuple(dict.fromkeys(found))


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        place = library / module
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def _licences() -> Iterator[str]:
    for name in LICENCES:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if "LICENSE" in file.name.upper() and file.suffix in ("", ".txt"):
                text = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
                yield "\n\n".join(text.split("\n\n")[:PARAGRAPHS_A_LICENCE])
                break
