"""Would another library compute faster than ours on this machine? ``python -m loadtest.backends``.

Needs ``pip install openvino onnxruntime onnx`` beside embedserve; ``--engines`` chooses some of them. Every engine has
a process of its own and takes turns with the others: all of them once a round, so that a machine that slows down does
so for all. Vectors are compared with our float32 passes. The mark: a library that beats our default by more than 15 %
in latency or throughput is worth a backend of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.engines import ENGINES, tokens_of

MARK = 1.15
OURS = "ours bf16"
REFERENCE = "ours fp32"
MIXED = sorted(np.random.default_rng(3).integers(3, 401, size=64).tolist(), reverse=True)
WORKLOADS: Mapping[str, Sequence[int]] = {
    "1 x 12": [12],
    "32 x 12": [12] * 32,
    "8 x 128": [128] * 8,
    "64 x 3-400": MIXED,
}
"""Tokens of each text."""


class Process:
    """One engine."""

    def __init__(self, name: str, folder: Path) -> None:
        """Start it, and wait until it can compute."""
        self.name = name
        command = [sys.executable, "-m", "loadtest.engines", name, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._heard()

    def ask(self, lengths: Sequence[int], seconds: float) -> dict[str, Any]:
        """One turn."""
        assert self._process.stdin is not None
        print(json.dumps({"lengths": list(lengths), "seconds": seconds}), file=self._process.stdin, flush=True)
        return self._heard()

    def end(self) -> None:
        """Close its input, at which it ends."""
        self._process.communicate()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # libraries print, too
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"{self.name} has ended with {self._process.wait()}")


def rounds(
    processes: Sequence[Process], workloads: Sequence[str], repeat: int, seconds: float
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What each engine gave for each workload, a turn each in every round."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {p.name: [] for p in processes} for name in workloads}
    for number in range(repeat):
        for workload in workloads:
            for process in processes:
                found[workload][process.name].append(process.ask(WORKLOADS[workload], seconds))
        print(f"round {number + 1} of {repeat}", file=sys.stderr)
    return found


def show(
    workload: str, lengths: Sequence[int], turns: Mapping[str, Sequence[Mapping[str, Any]]], reference: Any
) -> list[str]:
    """Print one workload's table; the engines that beat ours by more than the mark."""
    medians = {name: statistics.median(turn["ms"] for turn in given) for name, given in turns.items()}
    print(f"\n{workload}: {len(tokens_of(lengths))} texts, {sum(lengths)} tokens")
    print("| engine | ms (lowest to highest) | tokens/s | of ours | CPU, us a token | texts a batch | least cosine |")
    print("|---|---|---|---|---|---|---|")
    for name, given in turns.items():
        ms = [turn["ms"] for turn in given]
        cpu = statistics.median(turn["cpu_us_a_token"] for turn in given)
        cosine = np.min(np.sum(np.load(given[-1]["vectors"]) * reference, axis=1))
        ratio = medians[OURS] / medians[name]
        rate = sum(lengths) / medians[name] * 1e3
        print(f"| {name} | {medians[name]:.2f} ({min(ms):.2f} to {max(ms):.2f}) | {rate:,.0f} | {ratio:.2f} "
              f"| {cpu:.0f} | {given[-1]['batch']} | {cosine:.5f} |")  # fmt: skip
    return [name for name in turns if not name.startswith("ours") and medians[OURS] / medians[name] > MARK]


def main() -> int:
    """Measure, print the tables and the verdict; 0 where no other engine passes the mark."""
    parser = argparse.ArgumentParser(description="Our CPU backend beside OpenVINO and ONNX Runtime.")
    rivals = [name for name in ENGINES if not name.startswith("ours")]
    others = [name for name in ENGINES if name != OURS]
    parser.add_argument("--engines", nargs="+", choices=others, default=rivals, metavar="NAME", help=", ".join(others))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn")
    parser.add_argument("--folder", type=Path, help="where graphs are kept; a fresh one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as fresh:
        folder = options.folder or Path(fresh)
        folder.mkdir(parents=True, exist_ok=True)
        processes = [Process(name, folder) for name in [OURS, *options.engines]]
        wanted = {name: WORKLOADS[name] for name in options.workloads}
        judge = Process(REFERENCE, folder)
        known = {name: np.load(judge.ask(lengths, 0.0)["vectors"]) for name, lengths in wanted.items()}
        judge.end()
        found = rounds(processes, options.workloads, options.repeat, options.seconds)
        for process in processes:
            process.end()
        faster = [f"{name}: {workload}" for workload, lengths in wanted.items()
                  for name in show(workload, lengths, found[workload], known[workload])]  # fmt: skip
    print(f"\nfaster than ours by more than {MARK - 1:.0%}: {'; '.join(faster) or 'none'}")
    return 1 if faster else 0


if __name__ == "__main__":
    sys.exit(main())
