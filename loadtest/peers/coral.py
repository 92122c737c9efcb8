"""coral-gpu-inference 0.1.0: a grpc.aio server that takes padded rows of token ids.

Decides how a coral user works: the client tokenises, picks the bucket of each text, pads its row to exactly that length
and sends one ``Infer`` for each bucket of a call, all at once. Must never know how calls are scheduled or counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tokenizers import Tokenizer

from loadtest.answer import Answer
from loadtest.peers.checkpoint import prefixed_copy
from loadtest.peers.coral_proto import COMPLETED, INFER, InferRequest, InferResponse, differences, installed_descriptor
from loadtest.peers.peer import HOST, Launch, Peer, Vectors
from loadtest.target import Reply
from loadtest.wire_client import Connection

__all__ = ["BUCKETS", "Coral", "CoralTarget", "grouped", "request_of", "rows_of"]

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Row lengths that the server knows; anything else is a KeyError there."""
TOKENS_MAX = 256
"""As the checkpoint's ``max_seq_length`` says, and as every other peer truncates."""
CONNECTIONS = 4
"""As embedserve is given."""
STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
OPEN_S_MAX = 10.0
WAIT_MS_DEFAULT = 30_000
SPECIAL_IDS_NAMES = ("[CLS]", "[SEP]")

Rows = npt.NDArray[np.int32]


class Coral(Peer):
    """The server this project replaces."""

    name = "coral"
    about = "coral-gpu-inference 0.1.0: grpc.aio, padded rows of token ids, buckets 16 to 512"
    requirements = ("coral-gpu-inference==0.1.0",)
    variants = ("float32", "bfloat16")

    @property
    def reference(self) -> str:
        """It leaves [CLS] and [SEP] out of the mean, whatever the checkpoint says."""
        return "the checkpoint in fp32, mean without [CLS] and [SEP]"

    def prepare(self, checkpoint: Path, folder: Path, python: Path) -> Path:
        """A copy whose tensors begin with ``bert.``.

        Its loader takes every name that begins with ``encoder.`` for a wrapper's, strips that and so drops all layers
        of a plain BERT checkpoint, with a warning; transformers strips ``bert.`` itself and loads them all. There is
        no setting for the dtype: transformers takes it from the configuration.
        """
        del python
        return prefixed_copy(checkpoint, folder / f"model-{self.variant}", "bert.", config={"dtype": self.variant})

    def launch(self, python: Path, model: Path, port: int) -> Launch:
        """Its module, with metrics off. Raises ``RuntimeError`` where the package speaks another contract."""
        generated = next(python.parent.parent.glob("lib/python*/site-packages/coral_gpu_inference/inference_pb2.py"))
        differ = differences(installed_descriptor(generated))
        if differ:
            raise RuntimeError(f"the installed coral-gpu-inference has another proto: {'; '.join(differ)}")
        env = {
            "MODEL_PATH": str(model),
            "GRPC_HOST": HOST,
            "GRPC_PORT": str(port),
            "HTTP_HEALTH_PORT": "0",
            "METRICS_ENABLED": "false",
            "HF_HUB_OFFLINE": "1",
        }
        return Launch([str(python), "-m", "coral_gpu_inference.grpc_server"], env)

    def target(self, address: str, model: Path) -> CoralTarget:
        """A client that tokenises."""
        return CoralTarget(address, model / "tokenizer.json")

    def expected(self, texts: Sequence[str], checkpoint: Path) -> Vectors:
        """Its pooling over the checkpoint as published, by transformers in fp32."""
        return _pooled_without_specials(texts, checkpoint)


class CoralTarget:
    """A client of one coral server: tokenising in the call, and the same gRPC client that embedserve is called with."""

    def __init__(self, address: str, tokenizer_file: Path) -> None:
        """Nothing is opened or read yet."""
        self._address = address
        self._tokenizer_file = tokenizer_file
        self._connections: list[Connection] = []
        self._turn = 0
        self._tokenizer: Any = None

    async def open(self) -> None:
        """Connect. Raises ``ConnectionError`` after 10 s."""
        self._tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(TOKENS_MAX)
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(OPEN_S_MAX):
                for _ in range(CONNECTIONS):
                    _, connection = await asyncio.get_running_loop().create_connection(
                        lambda: Connection(self._address, INFER, None, ()), host, int(port)
                    )
                    self._connections.append(connection)
                    await connection.ready()
        except (OSError, TimeoutError) as error:
            raise ConnectionError(f"coral at {self._address} cannot be reached: {error or 'no answer'}") from None

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """One ``Infer`` a bucket; the call is OK when all of them are."""
        rows = self._tokenize(texts)
        groups = grouped(rows)
        calls = [self._call(rows, chosen, bucket, timeout_s) for bucket, chosen in groups.items()]
        for answer, chosen in zip(await asyncio.gather(*calls), groups.values(), strict=True):
            if answer.code:
                return Reply(STATUS_NAMES.get(answer.code, "UNKNOWN"))
            try:
                rows_of(answer.messages(), len(chosen))
            except ValueError:
                return Reply("INTERNAL", "NOT_READABLE")
        return Reply("OK", items=len(rows), tokens=sum(map(len, rows)))

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """As ``VectorTarget`` says."""
        rows = self._tokenize(texts)
        out: dict[int, Any] = {}
        for bucket, chosen in grouped(rows).items():
            answer = await self._call(rows, chosen, bucket, OPEN_S_MAX)
            if answer.code:
                raise ConnectionError(f"coral answered {STATUS_NAMES.get(answer.code, answer.code)}")
            try:
                out.update(zip(chosen, rows_of(answer.messages(), len(chosen)), strict=True))
            except ValueError as error:
                raise ConnectionError(f"coral's answer cannot be read: {error}") from error
        return np.stack([out[index] for index in range(len(texts))])

    async def close(self) -> None:
        """Give up the connections."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    async def _call(
        self, rows: Sequence[Sequence[int]], chosen: Sequence[int], bucket: int, timeout_s: float
    ) -> Answer:
        request = request_of([rows[index] for index in chosen], bucket, round(timeout_s * 1000))
        self._turn += 1
        return await self._connections[self._turn % CONNECTIONS].exchange(request, timeout_s)


def grouped(rows: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """The rows of each bucket, by their place; buckets that nobody needs are left out."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(next(bucket for bucket in BUCKETS if len(row) <= bucket), []).append(index)
    return groups


def request_of(rows: Sequence[Sequence[int]], bucket: int, wait_ms: int = WAIT_MS_DEFAULT) -> bytes:
    """A serialised ``InferRequest`` for rows of one bucket: int32, row-major, padded to the bucket with zeros."""
    ids: Rows = np.zeros((len(rows), bucket), dtype="<i4")
    mask: Rows = np.zeros((len(rows), bucket), dtype="<i4")
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    request = InferRequest(
        request_id="loadtest", bucket_max_len=bucket, max_wait_ms=wait_ms, input_ids_bytes=ids.tobytes(),
        attention_mask_bytes=mask.tobytes(), num_items=len(rows), seq_len=bucket,
    )  # fmt: skip
    message: bytes = request.SerializeToString()
    return message


def rows_of(messages: Sequence[bytes], count: int) -> Vectors:
    """The vectors of an answer, float32 ``[count, dimensions]``. Raises ``ValueError`` where it is no such answer."""
    try:
        (message,) = messages
        response = InferResponse.FromString(message)
    except DecodeError as error:
        raise ValueError(f"not an InferResponse: {error}") from error
    given: Vectors = np.frombuffer(response.embeddings_bytes, dtype="<f4")
    if response.status != COMPLETED or not given.size or given.size != count * response.embedding_dim:
        raise ValueError(f"OK with {given.size} floats for {count} texts, status {response.status}")
    return given.reshape(count, response.embedding_dim)


def _pooled_without_specials(texts: Sequence[str], checkpoint: Path) -> Vectors:
    import torch  # noqa: PLC0415 - seconds, and a client process needs none of it
    from transformers import AutoModel  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS_MAX)
    model = AutoModel.from_pretrained(str(checkpoint), dtype=torch.float32).eval()
    special = {tokenizer.token_to_id(name) for name in SPECIAL_IDS_NAMES}
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer.encode(text).ids
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            kept = hidden[[place for place, token in enumerate(ids) if token not in special]]
            found.append(torch.nn.functional.normalize(kept.mean(0), dim=0).numpy())
    return np.stack(found)
