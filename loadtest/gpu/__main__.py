"""Every mark of the GPU engine on the device that is here: ``python -m loadtest.gpu``.

    python -m loadtest.gpu                         all of it, some five minutes on an H200; loadtest/results/gpu.json
    python -m loadtest.gpu --only equal mixed      some of it
    python -m loadtest.gpu --device cpu --tiny     the command itself, in seconds, on any machine; no figure means
    anything, and none is written without --out

Parts that need what is not installed (sentence-transformers, the service's own packages) are left out and named. What
is measured is written after each part, so that a run that is cut short leaves what it had. Without a GPU it ends with
2, and a part that fails with 1.

Marks: ``MARKS``. Models have the sizes of MiniLM and BERT-base and random weights; ``--checkpoint`` serves another.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from embedserve.model.torch_backend import TorchBackend
from loadtest.gpu import rival, service
from loadtest.gpu.checkpoint import BERT_BASE, MINILM, TINY, Size, save
from loadtest.gpu.engine import Device, batches_of, load, parity, rate

RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu.json"
MARKS = {
    "parity.least_cosine": 0.999,
    "equal.minilm.tokens_per_s": 10e6,
    "equal.bert_base.tokens_per_s": 2.5e6,
    "mixed.share_of_equal": 0.8,
    "rival.short.ratio": 3.0,
    "rival.long.ratio": 1.3,
    "busy.busy": 0.95,
    "service.share_of_engine": 0.7,
}
"""What must be reached; all are minima but ``AT_MOST``'s."""
AT_MOST = {"service.one_caller_p50_ms": 2.0}
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "sentence-transformers", "grpcio")
LENGTH = 128
MIXED = (3, 512)


@dataclass
class Bench:
    """What the parts share: models on disk, one warm backend at a time, and what was found."""

    device: Device
    tiny: bool
    folder: Path
    checkpoint: Path | None
    found: dict[str, Any] = field(default_factory=dict)

    def checkpoint_of(self, size: Size) -> Path:
        """Of this size, or the one that was named."""
        if self.checkpoint is not None and size is MINILM:
            return self.checkpoint
        size = TINY if self.tiny else size
        folder = self.folder / size.name
        return folder if folder.is_dir() else save(folder, size)

    def backend(self, size: Size, **options: Any) -> TorchBackend:
        """Loaded and warm."""
        return load(self.checkpoint_of(size), self.device, **options)

    def rate(self, backend: TorchBackend, lengths: tuple[int, int], rows_max: int = 512) -> dict[str, Any]:
        """Of full batches of such texts."""
        batches = batches_of(lengths, self.device.batch_tokens, backend.identity.vocab_size, rows_max)
        return rate(backend, batches, self.device)


def measure_parity(bench: Bench) -> dict[str, Any]:
    """Against the same weights in float32 on the CPU, padded, a text at a time."""
    reference = TorchBackend(_loaded(bench.checkpoint_of(MINILM)), device="cpu", dtype="float32", attention="padded")
    return parity(bench.backend(MINILM), reference, 40 if bench.tiny else 1000, 64 if bench.tiny else 512)


def measure_equal(bench: Bench) -> dict[str, Any]:
    """Texts of 128 tokens; with what a start costs."""
    found: dict[str, Any] = {}
    for size in (MINILM, BERT_BASE):
        begun = time.monotonic()
        backend = bench.backend(size)
        start_s = time.monotonic() - begun
        graphs = backend.report().graphs
        found[size.name] = {
            **bench.rate(backend, (LENGTH, LENGTH)),
            "start_s": start_s,
            "graphs": graphs.captured,
            "graphs_planned": graphs.planned,
            "capture_s": graphs.capture_s,
            "graph_memory_bytes": graphs.memory_bytes,
            "graph_failure": graphs.failure,
            "memory_used_bytes": backend.report().memory_used_bytes,
        }
    return found


def measure_mixed(bench: Bench) -> dict[str, Any]:
    """Texts of 3 to 512 tokens, and what that is of the same device's rate for texts of one length."""
    backend = bench.backend(MINILM)
    figures = bench.rate(backend, MIXED)
    equal = bench.rate(backend, (LENGTH, LENGTH))["tokens_per_s"]
    return {**figures, "equal_tokens_per_s": equal, "share_of_equal": figures["tokens_per_s"] / equal}


def measure_choices(bench: Bench) -> dict[str, Any]:
    """What was built two ways: which one wins, for short and for ordinary texts."""
    ways: dict[str, dict[str, Any]] = {
        "as configured": {},
        "without graphs": {"graphs": False},
        "tiles up to 64 tokens": {"tiles_length_max": 64},
        "tiles up to 128 tokens": {"tiles_length_max": 128},
        "2048 texts a pass": {"rows_max": 2048},
    }
    if not bench.tiny:  # inductor's C++ takes half a minute on a CPU, and says nothing of a GPU
        ways["compiled"] = {"compiled": True}
        ways["compiled, without graphs"] = {"compiled": True, "graphs": False}
    found = {}
    for name, options in ways.items():
        try:
            backend = bench.backend(MINILM, **options)
            rows_max = options.get("rows_max", 512)
            found[name] = {
                f"{shape} tokens": round(bench.rate(backend, (shape, shape), rows_max)["tokens_per_s"])
                for shape in (12, 50, LENGTH)
            }
        except Exception as error:  # noqa: BLE001 - one way that fails is a finding; the others are still measured
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return found


def measure_busy(bench: Bench) -> dict[str, Any]:
    """Passes of 32 texts of 50 tokens and no more: small ones, where the host could be the limit."""
    return bench.rate(bench.backend(MINILM), (50, 50), rows_max=32)


def measure_rival(bench: Bench) -> dict[str, Any]:
    """sentence-transformers, texts of 5 to 12 words and of 510."""
    folder = bench.checkpoint_of(MINILM)
    backend = bench.backend(MINILM)
    counts = (64, 8) if bench.tiny else (16_384, 2048)
    shapes = {"short": ((5, 12), counts[0]), "long": ((510, 510), counts[1])}
    return {
        name: rival.compare(backend, folder, rival.texts_of(words, count), bench.device)
        for name, (words, count) in shapes.items()
    }


def measure_service(bench: Bench) -> dict[str, Any]:
    """50-token texts, 64 a call, against the engine alone with the same texts; and one caller."""
    engine = bench.rate(bench.backend(MINILM), (50, 50))["texts_per_s"]
    device = bench.device
    found = service.measure(bench.checkpoint_of(MINILM), device.name, device.dtype, max(device.seconds, 2.0), 8)
    return {**found, "engine_texts_per_s": engine, "share_of_engine": found["texts_per_s"] / engine}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "parity": measure_parity,
    "equal": measure_equal,
    "mixed": measure_mixed,
    "busy": measure_busy,
    "rival": measure_rival,
    "choices": measure_choices,
    "service": measure_service,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu", description="Every mark of the GPU engine.")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="to try the command: a tiny model, and no time for figures")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--checkpoint", type=Path, help="in place of random weights of MiniLM's size")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each figure; 4")
    parser.add_argument(
        "--out", type=Path, help="the result; loadtest/results/gpu.json, and none with --tiny or on a CPU"
    )
    options = parser.parse_args(arguments)
    on_gpu = options.device != "cpu"
    if on_gpu and not _is_here(options.device):
        print(f"there is no {options.device} here; --device cpu --tiny tries the command without one", file=sys.stderr)
        return 2
    out = options.out or (RESULT if on_gpu and not options.tiny else None)
    if options.tiny:
        device = Device(options.device, "float32", seconds=0.05, repetitions=1, batch_tokens=512)
    else:
        device = Device(options.device, options.dtype, options.seconds, repetitions=3, batch_tokens=16_384)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, options.tiny, Path(folder), options.checkpoint)
        bench.found["facts"] = facts(options)
        for part in options.only:
            bench.found[part] = _measured(part, bench)
            print(f"{part}: {json.dumps(bench.found[part], indent=1)}", flush=True)
            bench.found["marks"] = marks(bench.found)
            if out is not None:
                out.parent.mkdir(exist_ok=True)
                out.write_text(json.dumps(bench.found, indent=2) + "\n", encoding="utf-8")
    for name, mark in bench.found["marks"].items():
        print(f"{'reached' if mark['reached'] else 'MISSED '}  {name}: {mark['found']:.4g}, mark {mark['mark']:.4g}")
    failed = [part for part in options.only if "failed" in bench.found[part]]
    for part in failed:
        print(f"FAILED   {part}: {bench.found[part]['failed']}")
    return 1 if failed else 0


def _is_here(name: str) -> bool:
    """Whether this machine has this GPU."""
    try:
        index = torch.device(name).index or 0
    except RuntimeError:  # no device's name
        return False
    return torch.cuda.is_available() and index < torch.cuda.device_count()


def _measured(part: str, bench: Bench) -> dict[str, Any]:
    if part == "rival" and not _installed("sentence-transformers"):
        return {"left_out": "sentence-transformers is not installed"}
    if part == "service" and (service.MISSING or bench.tiny):
        why = f"not installed: {', '.join(service.MISSING)}" if service.MISSING else "it has a load test of its own"
        return {"left_out": why}
    print(f"-- {part}", flush=True)
    begun = time.monotonic()
    try:
        found = PARTS[part](bench)
    except Exception as error:  # noqa: BLE001 - told, and the exit code says so; the other parts are still measured
        found = {"failed": f"{type(error).__name__}: {error}"}
    return {**found, "took_s": round(time.monotonic() - begun, 1)}


def marks(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each mark whose part was measured: what was found, and whether it is enough."""
    judged = {}
    for limits, enough in ((MARKS, lambda value, mark: value >= mark), (AT_MOST, lambda value, mark: value <= mark)):
        for name, mark in limits.items():
            value: Any = found
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                judged[name] = {"found": value, "mark": mark, "reached": bool(enough(value, mark))}
    return judged


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Where, when, what of, and by which command."""
    on_gpu = options.device != "cpu"
    commit = ""
    if shutil.which("git") is not None:
        command = ["git", "-C", str(RESULT.parents[2]), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": "python -m loadtest.gpu " + " ".join(sys.argv[1:]),
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "device": torch.cuda.get_device_name(options.device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
        "figures_mean_something": on_gpu and not options.tiny,
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _loaded(folder: Path) -> Any:
    from embedserve.model.checkpoint import load_checkpoint  # noqa: PLC0415 - beside its one use

    return load_checkpoint(str(folder), max_input_length=512)


if __name__ == "__main__":
    sys.exit(main())
