"""infinity-emb: a FastAPI server for embeddings over HTTP and JSON.

Decides how an infinity user works at best: ``POST /embeddings`` with vectors as base64, one pool of kept-open
connections. Must never know how calls are scheduled or counted.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson

from loadtest.peers.peer import HOST, Launch, Peer, Vectors, multiplies_bfloat16
from loadtest.target import Reply

__all__ = ["Infinity", "InfinityTarget", "status_of", "vectors_of"]

EXPORT = Path(__file__).parent / "export_onnx.py"
EXPORT_S_MAX = 300
MODEL_NAME = "loadtest"
OPEN_S_MAX = 10.0
POLL_S = 0.2
VECTORS_S_MAX = 60.0
STATUS = {400: "INVALID_ARGUMENT", 413: "RESOURCE_EXHAUSTED", 422: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED",
          500: "INTERNAL", 502: "UNAVAILABLE", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}  # fmt: skip
"""The nearest gRPC status of an HTTP one."""


class Infinity(Peer):
    """The usual HTTP server for embeddings."""

    name = "infinity"
    about = "infinity-emb 0.0.78: FastAPI, JSON with base64 vectors, torch engine with BetterTransformer"
    # infinity-emb's own ranges let pip take releases with which it does not start, or starts without its fast path:
    # optimum 2 has no bettertransformer, and the last transformers that 1.24 takes for it is 4.48. huggingface-hub < 1,
    # click < 8.2, typer < 0.13 and numpy < 2 follow from these two and from its extra "server".
    # optimum's extra "onnxruntime" brings datasets, and datasets 4 a pyarrow that wants numpy 2: held below that.
    requirements = ("infinity-emb[torch,server]==0.0.78", "optimum[onnxruntime]==1.24.0", "transformers==4.48.3",
                    "datasets<4", "pyarrow<21", "onnxscript==0.7.2")  # fmt: skip
    variants = ("auto", "float32", "bfloat16", "no-bettertransformer", "onnx")
    # auto: what embedserve's own "auto" takes on this processor. infinity's "auto" is float32 on every CPU.

    def prepare(self, checkpoint: Path, folder: Path, python: Path) -> Path:
        """The checkpoint itself; for its ONNX engine a copy with an exported graph."""
        if self.variant != "onnx":
            return checkpoint
        made = folder / "model-onnx"
        done = subprocess.run(
            [str(python), "-P", str(EXPORT), str(checkpoint), str(made)], capture_output=True, text=True, check=False,
            timeout=EXPORT_S_MAX, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{checkpoint} could not be exported to ONNX:\n{done.stderr[-2000:]}")
        return made

    def launch(self, python: Path, model: Path, port: int) -> Launch:
        """Its command, telemetry and the access log off; batches of 32, its default."""
        fast = self.variant == "bfloat16" or (self.variant == "auto" and multiplies_bfloat16())
        engine = ("optimum", "--pooling-method", "mean") if self.variant == "onnx" else ("torch",)
        command = [str(python.parent / "infinity_emb"), "v2", "--model-id", str(model),
                   "--served-model-name", MODEL_NAME, "--device", "cpu",
                   "--host", HOST, "--port", str(port), "--log-level", "error", "--batch-size", "32",
                   "--dtype", "bfloat16" if fast else "float32", "--engine", *engine]  # fmt: skip
        if self.variant == "no-bettertransformer":
            command.append("--no-bettertransformer")
        return Launch(command, {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"})

    def target(self, address: str, model: Path) -> InfinityTarget:
        """A client with as many connections as there are calls at once."""
        del model
        return InfinityTarget(address)


class InfinityTarget:
    """A client of one infinity server."""

    def __init__(self, address: str) -> None:
        """Nothing is opened yet."""
        self._address = address
        self._session: Any = None

    async def open(self) -> None:
        """Wait until it answers. Raises ``ConnectionError`` after 10 s."""
        self._session = aiohttp.ClientSession(
            f"http://{self._address}", connector=aiohttp.TCPConnector(limit=0), raise_for_status=False
        )
        ends = asyncio.get_running_loop().time() + OPEN_S_MAX
        while True:
            try:
                async with self._session.get("/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            if asyncio.get_running_loop().time() > ends:
                raise ConnectionError(f"infinity at {self._address} did not answer within {OPEN_S_MAX:.0f} s")
            await asyncio.sleep(POLL_S)

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """One POST."""
        try:
            status, body = await self._post(texts, timeout_s)
            if status != 200:
                return Reply(status_of(status))
            return Reply("OK", items=len(vectors_of(body, len(texts))))
        except TimeoutError:
            return Reply("DEADLINE_EXCEEDED")
        except aiohttp.ClientError:
            return Reply("UNAVAILABLE")
        except ConnectionError as error:
            return Reply("INTERNAL", reason=str(error))

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """As ``VectorTarget`` says."""
        try:
            status, body = await self._post(texts, VECTORS_S_MAX)
        except aiohttp.ClientError as error:
            raise ConnectionError(f"infinity at {self._address}: {error}") from error
        if status != 200:
            raise ConnectionError(f"infinity answered HTTP {status}: {body[:200]!r}")
        return vectors_of(body, len(texts))

    async def close(self) -> None:
        """Give up the connections."""
        if self._session is not None:
            await self._session.close()

    async def _post(self, texts: Sequence[str], timeout_s: float) -> tuple[int, bytes]:
        message = orjson.dumps({"model": MODEL_NAME, "input": list(texts), "encoding_format": "base64"})
        async with self._session.post(
            "/embeddings", data=message, headers={"content-type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as answer:  # fmt: skip
            return answer.status, await answer.read()


def status_of(http: int) -> str:
    """The nearest gRPC status of an HTTP one."""
    return STATUS.get(http, "UNKNOWN")


def vectors_of(body: bytes, count: int) -> Vectors:
    """The vectors of an answer, in order, float32 ``[count, dimensions]``. Raises ``ConnectionError`` for any other."""
    try:
        entries = sorted(orjson.loads(body)["data"], key=lambda entry: entry["index"])
        rows = [np.frombuffer(base64.b64decode(entry["embedding"]), dtype="<f4") for entry in entries]
    except (orjson.JSONDecodeError, binascii.Error, KeyError, TypeError, ValueError) as error:
        raise ConnectionError(f"infinity's answer is not an embedding list: {error!r}") from error
    if len(rows) != count or len({len(row) for row in rows}) != 1 or not rows[0].size:
        raise ConnectionError(f"infinity gave {len(rows)} vectors for {count} texts")
    return np.stack(rows)
