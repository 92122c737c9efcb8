"""Mutates the files of a checkpoint and loads it: refused with a sentence or served, nothing else.

A process of its own, so that memory has a hard limit and a hang can be ended:

    python -m tests.security.fuzz_checkpoint GOOD_CHECKPOINT FIRST_SEED COUNT [SECONDS]

Prints a line of JSON for each seed whose outcome is neither, and one with the totals at the end. The same seed mutates
the same file in the same way.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedserve.errors import StartupError
from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.tokenizer import Truncation
from embedserve.model.torch_backend import TorchBackend

ADDRESS_SPACE = 8 << 30
"""torch maps 3 GB when it is imported."""
ONE_S_MAX = 5.0
FILES = (
    "config.json", "modules.json", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json", "model.safetensors",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    0, -1, 1, 3, 2**31 - 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), -float("inf"), None, True, False,
    "", "x" * 5000, "\ud800", "../../etc/passwd", "/", ".", "a\x00b", "bert", [], {}, [[]], [{}], {"a": {}}, [None],
    ["x", 1],
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        if not (isinstance(inner, dict | list) and len(inner) > 2000):
            yield from places(inner)


def mutate_json(text: str, rng: random.Random) -> bytes:
    """Wrong values in right JSON, or JSON that is none."""
    if rng.random() < 0.25:
        return mutate_bytes(text.encode(), rng)
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(places(value)) or [([None], 0)])
        act = rng.random()
        if act < 0.15:
            del container[key]
        elif act < 0.25 and isinstance(container, dict):
            container[key + rng.choice(["", "_", "\ud800"])] = copy.deepcopy(rng.choice(ODD))
        elif act < 0.3:
            depth = rng.choice([10, 900, 100_000])
            return json.dumps(value).replace("{", '{"deep": ' + "[" * depth + "]" * depth + ", ", 1).encode()
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(value).encode()


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut, doubled."""
    changed = bytearray(raw)
    act = rng.random()
    if act < 0.2:
        return bytes(changed[: rng.randrange(len(changed) + 1)])
    if act < 0.3:
        start = rng.randrange(len(changed))
        return bytes(changed[:start] + changed[start : start + 200] + changed[start:])
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def mutate_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """The header lies: about its own length, about shapes, types, places; or is no header."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length], raw[8 + length :]
    act = rng.random()
    if act < 0.2:
        lie = rng.choice([0, 1, length - 1, length + 1, len(raw), 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", lie) + header + data
    if act < 0.3:
        return raw[: rng.randrange(len(raw))]
    value = json.loads(header)
    name = rng.choice([key for key in value if key != "__metadata__"])
    entry = value[name]
    match rng.randrange(5):
        case 0:
            entry["shape"] = rng.choice(
                [[2**40], [2**32, 2**32], [-1], [], [0], [1] * 5000, entry["shape"][::-1], None]
            )
        case 1:
            entry["dtype"] = rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "U64", "X", 3, None])
        case 2:
            entry["data_offsets"] = rng.choice([[0, 2**63], [-4, 0], [10, 4], [0, 0], [], [0, len(data)], None])
        case 3:
            del value[name]
        case _:
            value[rng.choice(["extra.weight", "\ud800", ""])] = entry
    changed = mutate_json(json.dumps(value), rng) if rng.random() < 0.2 else json.dumps(value).encode()
    return struct.pack("<Q", len(changed)) + changed + data


def mutate(directory: Path, seed: int) -> str:
    """Change one file of the checkpoint; returns its name."""
    rng = random.Random(seed)
    name = FILES[seed % len(FILES)]
    file = directory / name
    raw = file.read_bytes()
    changed = mutate_safetensors(raw, rng) if name.endswith(".safetensors") else mutate_json(raw.decode(), rng)
    file.write_bytes(changed)
    return name


def serve(directory: Path) -> None:
    """All that a server does before it is ready, and a text. Raises ``StartupError`` at most."""
    checkpoint = load_checkpoint(str(directory))
    prompt = dict(checkpoint.prompts).get(checkpoint.default_prompt_name or "", "")
    tokenizer = checkpoint.tokenizer()
    backend = TorchBackend(checkpoint, device="cpu", dtype="float32")
    backend.warm_up(256)
    tokenizer.encode(["hello world"], truncation=Truncation.END, prompt=prompt)


def outcome(good: Path, seed: int) -> dict[str, Any]:
    """What became of one mutation."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(shutil.copytree(good, Path(place) / "checkpoint"))
        name = mutate(directory, seed)
        begun = time.monotonic()
        said: dict[str, Any] = {"seed": seed, "file": name, "what": "served"}
        try:
            serve(directory)
        except StartupError as error:
            said["what"] = "refused"
            with contextlib.suppress(UnicodeEncodeError):
                str(error).encode()
        except BaseException as error:  # whatever it is, it is what is looked for
            last = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in last if "embedserve" in frame.filename]
            said |= {"what": "broken", "error": f"{type(error).__name__}: {error}"[:300], "at": str(ours[-1:])}
        said["seconds"] = round(time.monotonic() - begun, 3)
        if said["seconds"] > ONE_S_MAX:
            said["what"] += " slowly"
        return said


def main() -> None:
    """See the module's docstring."""
    good, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ends = time.monotonic() + float(sys.argv[4]) if len(sys.argv) > 4 else None
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    serve(good)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    totals: Counter[str] = Counter()
    seed = first
    while seed < first + count if ends is None else time.monotonic() < ends:
        said = outcome(good, seed)
        totals[said["what"]] += 1
        if said["what"] not in ("served", "refused"):
            print(json.dumps(said), flush=True)  # noqa: T201
        seed += 1
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(json.dumps({"totals": totals, "growth_mib": growth}))  # noqa: T201


if __name__ == "__main__":
    main()
