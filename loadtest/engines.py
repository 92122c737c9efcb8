"""Forward passes of several libraries behind one call, each in a process of its own: ours, OpenVINO, ONNX Runtime.

Decides each library's best form: the graph holds pooling and unit length, texts are sorted by length and cut into
batches that are padded to their longest, and of several sizes of batch the fastest is taken. Must never know what the
figures are compared with. The process is ``python -m loadtest.engines NAME FOLDER``; one line of JSON comes in for each
turn, and one goes out:

    {"lengths": [12, 12], "seconds": 1.0}  ->  {"ms": 1.3, "cpu_us_a_token": 60.0, ..., "vectors": "FILE"}
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedserve.config import load_config
from embedserve.model.backend import TokenBatch
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.cores import core_count
from embedserve.wiring import torch_backend

__all__ = ["ENGINES", "export", "tokens_of"]

Vectors = npt.NDArray[np.float32]
Rows = Sequence[npt.NDArray[np.int32]]
Engine = Callable[[Rows, int], Vectors]
"""Vectors of texts, in batches of so many."""

SEED = 17
BATCHES = (4, 8, 16, 32)
"""Texts of a padded batch that are tried."""
TRY_S = 0.3
COMPILE_S = 60.0
OPSET = 17
"""The newest whose patterns ONNX Runtime's optimizer for BERT knows."""


def tokens_of(lengths: Sequence[int]) -> list[npt.NDArray[np.int32]]:
    """Token ids of texts, the same in every process."""
    random = np.random.default_rng(SEED)
    return [random.integers(1000, 20000, size=length).astype(np.int32) for length in lengths]


def the_checkpoint() -> Checkpoint:
    """The default model."""
    return load_checkpoint(load_config({}).config.model.source, max_input_length=512)


# ---------------------------------------------------------------------------------------------------------- ours


def ours(dtype: str, *, compiled: bool = True) -> Engine:
    """Our backend as it serves."""
    settings = {"model.dtype": dtype, "model.compile": str(compiled).lower(), "model.compute_nice": "0"}
    backend = torch_backend(load_config(settings).config, the_checkpoint())()
    backend.warm_up(4096)
    ends = time.monotonic() + COMPILE_S
    while backend.report().compiling and time.monotonic() < ends:
        time.sleep(0.05)
    assert backend.report().compiled is compiled, backend.report().compile_failure

    def embed(rows: Rows, _size: int) -> Vectors:
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([row.size for row in rows], out=offsets[1:])
        batch = TokenBatch(np.concatenate(rows), offsets, np.ones(len(rows), np.bool_), None)
        return backend.embed(batch).vectors

    return embed


# -------------------------------------------------------------------------------------------------------- rivals


def export(folder: Path) -> Path:
    """The model with mean pooling and unit length as an ONNX graph; kept in ``folder``."""
    path = folder / "model.onnx"
    if path.exists():
        return path
    import torch  # noqa: PLC0415 - seconds, and only once
    from transformers import AutoModel  # noqa: PLC0415

    source = the_checkpoint().files.directory
    model = AutoModel.from_pretrained(source, attn_implementation="eager", dtype=torch.float32).eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any) -> Any:
            types = torch.zeros_like(ids)
            # The mask as floats of its own: what transformers makes of one cannot be traced for every size.
            bias = (1.0 - mask.unsqueeze(1).unsqueeze(2).float()) * -1e9
            hidden = self.model.embeddings(input_ids=ids, token_type_ids=types)
            for layer in self.model.encoder.layer:
                hidden = _first(layer(hidden, attention_mask=bias))
            weights = mask[:, :, None].float()
            return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    example = (torch.randint(1000, 2000, (3, 11)), torch.ones(3, 11, dtype=torch.int64))
    axes = {name: {0: "rows", 1: "tokens"} for name in ("ids", "mask")} | {"vectors": {0: "rows"}}
    torch.onnx.export(
        Encoder(), example, str(path), input_names=["ids", "mask"], output_names=["vectors"], dynamic_axes=axes,
        opset_version=OPSET, dynamo=False,
    )  # fmt: skip
    return path


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def padded(rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and mask, ``[rows, longest]``."""
    ids = np.zeros((len(rows), max(row.size for row in rows)), np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : row.size] = row
        mask[at, : row.size] = 1
    return ids, mask


def in_padded_batches(infer: Callable[..., Vectors], at_once: int) -> Engine:
    """``infer(ids, mask, lane)`` over batches of texts of like length, ``at_once`` of them at a time."""
    pool = ThreadPoolExecutor(at_once)

    def one_lane(given: Sequence[tuple[Any, Any]], lane: int) -> list[Vectors]:
        return [infer(*one, lane) for one in given[lane::at_once]]

    def embed(rows: Rows, size: int) -> Vectors:
        order = sorted(range(len(rows)), key=lambda i: -rows[i].size)
        cuts = [order[at : at + size] for at in range(0, len(order), size)]
        given = [padded([rows[i] for i in cut]) for cut in cuts]
        if at_once == 1 or len(given) == 1:
            found = [infer(*one, 0) for one in given]
        else:
            parts = [iter(part) for part in pool.map(partial(one_lane, given), range(at_once))]
            found = [next(parts[i % at_once]) for i in range(len(given))]
        vectors = np.empty((len(rows), found[0].shape[1]), np.float32)
        for cut, part in zip(cuts, found, strict=True):
            vectors[cut] = part
        return vectors

    return embed


def openvino(folder: Path, hint: str, streams: int, *, precision: str = "bf16", fixed: bool = False) -> Engine:
    """OpenVINO's CPU plugin; ``fixed`` compiles a graph for each shape that is met."""
    ov = importlib.import_module("openvino")
    core = ov.Core()
    settings = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": core_count(),
        "CPU_RUNTIME_CACHE_CAPACITY": 5000,
    }
    path = str(export(folder))
    dynamic = None if fixed else core.compile_model(path, "CPU", settings)
    requests: dict[tuple[Any, ...], Any] = {}

    def infer(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], lane: int) -> Vectors:
        key = (lane, *(ids.shape if fixed else ()))
        request = requests.get(key)
        if request is None:
            compiled = dynamic
            if compiled is None:
                model = core.read_model(path)
                model.reshape({"ids": list(ids.shape), "mask": list(ids.shape)})
                compiled = core.compile_model(model, "CPU", settings)
            request = requests[key] = compiled.create_infer_request()
        found: Vectors = np.array(request.infer({"ids": ids, "mask": mask}, share_inputs=True)["vectors"])
        return found

    return in_padded_batches(infer, streams)


def onnxruntime(folder: Path, form: str, sessions: int) -> Engine:
    """ONNX Runtime's CPU provider over its own optimizer's graph, in ``fp32`` or with ``int8`` products.

    Its CPU provider has no bfloat16 products on x86.
    """
    ort = importlib.import_module("onnxruntime")
    path = folder / f"ort-{form}.onnx"
    if not path.exists():
        optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
        config = the_checkpoint().config
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        fused = optimizer.optimize_model(str(export(folder)), "bert", num_heads=heads, hidden_size=hidden, opt_level=1)
        fused.save_model_to_file(str(folder / "ort-fp32.onnx"))
        (folder / "ort-fused.json").write_text(json.dumps(fused.get_fused_operator_statistics()))
        if form == "int8":
            quantization = importlib.import_module("onnxruntime.quantization")
            quantization.quantize_dynamic(
                str(folder / "ort-fp32.onnx"), str(path), weight_type=quantization.QuantType.QInt8, per_channel=True,
                extra_options={"DefaultTensorType": 1},  # float32: the fused operators are not in ONNX's own domain
            )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = max(core_count() // sessions, 1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    made = [ort.InferenceSession(str(path), options, ["CPUExecutionProvider"]) for _ in range(sessions)]

    def infer(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], lane: int) -> Vectors:
        found: Vectors = made[lane].run(None, {"ids": ids, "mask": mask})[0]
        return found

    return in_padded_batches(infer, sessions)


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "ours bf16": lambda _: ours("bfloat16"),
    "ours fp32": lambda _: ours("float32"),
    "openvino bf16 latency": lambda folder: openvino(folder, "LATENCY", 1),
    "openvino bf16 latency, fixed shapes": lambda folder: openvino(folder, "LATENCY", 1, fixed=True),
    "openvino bf16 throughput, 2 streams": lambda folder: openvino(folder, "THROUGHPUT", 2),
    "openvino bf16 throughput, fixed shapes": lambda folder: openvino(folder, "THROUGHPUT", 2, fixed=True),
    "openvino fp32 throughput, 2 streams": lambda folder: openvino(folder, "THROUGHPUT", 2, precision="f32"),
    "onnxruntime fp32": lambda folder: onnxruntime(folder, "fp32", 1),
    "onnxruntime fp32, 2 sessions": lambda folder: onnxruntime(folder, "fp32", 2),
    "onnxruntime int8": lambda folder: onnxruntime(folder, "int8", 1),
    "onnxruntime int8, 2 sessions": lambda folder: onnxruntime(folder, "int8", 2),
}
"""By name; each is made in a process of its own."""


# -------------------------------------------------------------------------------------------------------- a turn


class Turns:
    """One engine's turns; what is the best size of batch is found in the first of each workload."""

    def __init__(self, engine: Engine, folder: Path, *, cuts_itself: bool) -> None:
        """Over an engine that is ready; vectors are left in ``folder``. One that ``cuts_itself`` gets all texts."""
        self._engine, self._folder, self._cuts_itself = engine, folder, cuts_itself
        self._best: dict[tuple[int, ...], int] = {}

    def take(self, lengths: Sequence[int], seconds: float) -> dict[str, Any]:
        """Time passes over texts of ``lengths`` for ``seconds``; at least one."""
        rows = tokens_of(lengths)
        key = tuple(lengths)
        if key not in self._best:
            sizes = [] if self._cuts_itself else [size for size in BATCHES if size < len(rows)]
            self._best[key] = len(rows)
            if sizes:
                self._best[key] = min([*sizes, len(rows)], key=lambda size: self._times(rows, size, TRY_S)[0])
        size = self._best[key]
        ms, cpu_us = self._times(rows, size, seconds)
        path = self._folder / f"vectors-{len(rows)}-{sum(lengths)}-{time.monotonic_ns()}.npy"
        np.save(path, self._engine(rows, size))
        return {"ms": ms, "cpu_us_a_token": cpu_us, "batch": size, "vectors": str(path)}

    def _times(self, rows: Rows, size: int, seconds: float) -> tuple[float, float]:
        """Median milliseconds for all rows, and microseconds of CPU a token over all of the time."""
        if seconds > 0:
            self._engine(rows, size)
        times: list[float] = []
        begun, cpu = time.perf_counter(), time.process_time()
        while not times or time.perf_counter() - begun < seconds:
            at = time.perf_counter()
            self._engine(rows, size)
            times.append(time.perf_counter() - at)
        tokens = sum(row.size for row in rows) * len(times)
        return statistics.median(times) * 1e3, (time.process_time() - cpu) / tokens * 1e6


def main() -> int:
    """The process of one engine."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    turns = Turns(ENGINES[name](folder), folder, cuts_itself=name.startswith("ours"))
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(turns.take(asked["lengths"], asked["seconds"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
