"""The engine alone, in a process of its own: tokenizer and model, no service, no other caller.

Decides what the best is that this machine's model can give for a scenario's texts: sorted by length, in batches of the
size that was fastest when several were tried. Must never know what is compared with it. One command a line comes on
standard input, one line of JSON goes out for each:

    {"all": SECONDS}     texts/s and tokens/s over all texts; forward pass alone, and with tokenising
    {"one": SECONDS}     milliseconds for one text, again and again: tokenise, forward, both
    {"matrix": SECONDS}  FLOP/s of large matrix products in the model's dtype, and what the model makes of its share
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

from embedserve.config import load_config
from embedserve.model.backend import Backend, TokenBatch
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.tokenizer import TextTokenizer, Truncation
from embedserve.wiring import torch_backend
from loadtest.corpus import texts_of_scenario
from loadtest.scenario import Scenario

BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a batch that are tried."""
TRY_S = 1.5
"""For each budget."""
COMPILE_S = 60.0
"""A compiled model that has not taken over by then is not waited for."""
TEXTS = 4096
"""Of the scenario: enough for a hundred batches."""
MATRIX = 4096
"""Rows and columns of the large matrices."""


class Bare:
    """The model and its texts."""

    def __init__(self, scenario: Scenario, settings: dict[str, str]) -> None:
        """Load the model as the service does, with the same settings."""
        config = load_config(settings).config
        model = config.model
        self.checkpoint: Checkpoint = load_checkpoint(
            model.source, revision=model.revision, max_input_length=model.max_input_length
        )
        self.backend: Backend = torch_backend(config, self.checkpoint)()
        self.tokenizer: TextTokenizer = self.checkpoint.tokenizer()
        self.texts = texts_of_scenario(scenario.texts, scenario.seed)[:TEXTS]
        self.backend.warm_up(max(BUDGETS))
        self._wait_for_compiled(compiled=bool(getattr(model, "compile", False)))
        self.budget = max(BUDGETS, key=lambda budget: self.rate(budget, TRY_S)["forward_texts_per_s"])

    def _wait_for_compiled(self, *, compiled: bool) -> None:
        ends = time.monotonic() + COMPILE_S
        batch = next(self._batches(max(BUDGETS)))
        while compiled and time.monotonic() < ends:
            self.backend.embed(batch)
            report = self.backend.report()
            if report.compiled or report.compile_failure:
                return

    def _batches(self, budget: int) -> Iterator[TokenBatch]:
        """All texts, longest first, as batches of up to ``budget`` tokens."""
        found = self.tokenizer.encode(self.texts, truncation=Truncation.END)
        starts = np.concatenate(([0], np.cumsum(found.lengths)))
        rows: list[int] = []
        tokens = 0
        for row in np.argsort(-found.lengths, kind="stable").tolist():
            length = int(found.lengths[row])
            if rows and tokens + length > budget:
                yield self._batch(found.ids, starts, rows)
                rows, tokens = [], 0
            rows.append(row)
            tokens += length
        yield self._batch(found.ids, starts, rows)

    @staticmethod
    def _batch(ids: Any, starts: Any, rows: list[int]) -> TokenBatch:
        parts = [ids[starts[row] : starts[row + 1]] for row in rows]
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return TokenBatch(np.concatenate(parts), offsets, np.ones(len(rows), np.bool_), None)

    def rate(self, budget: int, seconds: float) -> dict[str, float]:
        """Texts and tokens a second, in as many rounds over all texts as ``seconds`` take; one at least begun."""
        texts = tokens = 0
        tokenizing = forward = 0.0
        order = Random(17)
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            at = time.perf_counter()
            batches = list(self._batches(budget))
            per_batch = (time.perf_counter() - at) / len(batches)
            # A round that the time cuts short has seen long and short texts alike.
            order.shuffle(batches)
            for batch in batches:
                at = time.perf_counter()
                self.backend.embed(batch)
                forward += time.perf_counter() - at
                # Each batch carries its share of the tokenising: a round that is cut short has not paid for the rest.
                tokenizing += per_batch
                texts += len(batch.offsets) - 1
                tokens += len(batch.ids)
                if time.perf_counter() - begun > seconds:
                    break
        return {
            "forward_texts_per_s": texts / forward,
            "forward_tokens_per_s": tokens / forward,
            "texts_per_s": texts / (forward + tokenizing),
            "tokens_per_s": tokens / (forward + tokenizing),
            "batch_tokens": budget,
        }

    def one(self, seconds: float) -> dict[str, float]:
        """Medians for one text at a time, in milliseconds."""
        tokenize, forward = [], []
        begun, number = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            at = time.perf_counter()
            found = self.tokenizer.encode([self.texts[number % len(self.texts)]], truncation=Truncation.END)
            between = time.perf_counter()
            self.backend.embed(self._batch(found.ids, [0, len(found.ids)], [0]))
            ends = time.perf_counter()
            tokenize.append(between - at)
            forward.append(ends - between)
            number += 1
        both = np.array(tokenize) + np.array(forward)
        return {
            "tokenize_p50_ms": float(np.median(tokenize)) * 1e3,
            "forward_p50_ms": float(np.median(forward)) * 1e3,
            "p50_ms": float(np.median(both)) * 1e3,
        }

    def matrix(self, seconds: float) -> dict[str, float]:
        """FLOP/s of a large square matrix product, and of the model at its best batch.

        A layer of hidden size h and inner size i costs ``2 (4 h h + 2 h i)`` FLOP a token, and its attention
        ``4 s h`` for a text of s tokens; a pass of packed rows computes nothing else of weight.
        """
        import torch  # noqa: PLC0415 - loaded by the model anyway; not for --help

        dtype = getattr(torch, self.backend.identity.dtype)
        a, b = (torch.randn(MATRIX, MATRIX, dtype=torch.float32).to(dtype) for _ in range(2))
        best = 0.0
        with torch.inference_mode():
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds:
                at = time.perf_counter()
                torch.mm(a, b)
                best = max(best, 2 * MATRIX**3 / (time.perf_counter() - at))
        config = self.checkpoint.config
        h, i, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        lengths = self.tokenizer.encode(self.texts, truncation=Truncation.END).lengths.astype(np.float64)
        attention = 4 * h * float((lengths**2).sum() / lengths.sum())
        flop_a_token = layers * (2 * (4 * h * h + 2 * h * i) + attention)
        model = self.rate(self.budget, seconds)["forward_tokens_per_s"] * flop_a_token
        return {"matrix_flop_per_s": best, "model_flop_per_s": model, "share": model / best}


def main() -> int:
    """The process: the scenario as JSON on the first line, settings as NAME VALUE pairs in the arguments."""
    names, values = sys.argv[1::2], sys.argv[2::2]
    scenario = Scenario.model_validate_json(sys.stdin.readline())
    settings = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
    bare = Bare(scenario, settings)
    report = bare.backend.report()
    facts = {"dtype": bare.backend.identity.dtype, "compiled": report.compiled, "batch_tokens": bare.budget}
    print(json.dumps({"ready": True, **facts}), flush=True)
    for line in sys.stdin:
        ((what, seconds),) = json.loads(line).items()
        answers: dict[str, Any] = {"one": bare.one, "matrix": bare.matrix}
        found = bare.rate(bare.budget, seconds) if what == "all" else answers[what](seconds)
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
