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
from tokenizers import Tokenizer

from loadtest.peers.checkpoint import prefixed_copy
from loadtest.peers.coral_proto import COMPLETED, INFER, InferRequest, InferResponse, differences, installed_descriptor
from loadtest.peers.peer import HOST, Launch, Peer, Vectors
from loadtest.target import Reply

__all__ = ["BUCKETS", "Coral", "CoralTarget", "grouped", "request_of", "rows_of"]

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Row lengths that the server knows; anything else is a KeyError there."""
TOKENS_MAX = 256
"""As the checkpoint's ``max_seq_length`` says, and as every other peer truncates."""
MESSAGE_BYTES_MAX = 64 << 20
"""The server's own limit."""
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

    def prepare(self, checkpoint: Path, folder: Path) -> Path:
        """A copy whose tensors begin with ``bert.``.

        Its loader takes every name that begins with ``encoder.`` for a wrapper's, strips that and so drops all layers
        of a plain BERT checkpoint, with a warning; transformers strips ``bert.`` itself and loads them all. There is
        no setting for the dtype: transformers takes it from the configuration.
        """
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
    """A client of one coral server: one channel, tokenising in the call."""

    def __init__(self, address: str, tokenizer_file: Path) -> None:
        """Nothing is opened or read yet."""
        self._address = address
        self._tokenizer_file = tokenizer_file
        self._channel: Any = None
        self._infer: Any = None
        self._tokenizer: Any = None

    async def open(self) -> None:
        """Connect. Raises ``ConnectionError`` after 10 s."""
        self._tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(TOKENS_MAX)
        limits = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                  ("grpc.max_send_message_length", MESSAGE_BYTES_MAX)]  # fmt: skip
        self._channel = grpc.aio.insecure_channel(self._address, options=limits)
        self._infer = self._channel.unary_unary(
            INFER, request_serializer=InferRequest.SerializeToString, response_deserializer=InferResponse.FromString
        )
        try:
            await asyncio.wait_for(self._channel.channel_ready(), OPEN_S_MAX)
        except TimeoutError:
            raise ConnectionError(f"coral at {self._address} did not answer within {OPEN_S_MAX:.0f} s") from None

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """One ``Infer`` a bucket; the call is OK when all of them are."""
        rows = self._tokenize(texts)
        groups = grouped(rows)
        calls = [self._call(rows, chosen, bucket, timeout_s) for bucket, chosen in groups.items()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, grpc.aio.AioRpcError):
                return Reply(answer.code().name)
            if isinstance(answer, ConnectionError):
                return Reply("INTERNAL", reason=str(answer))
            if isinstance(answer, BaseException):
                raise answer
        return Reply("OK", items=len(rows), tokens=sum(map(len, rows)))

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """As ``VectorTarget`` says."""
        rows = self._tokenize(texts)
        out: dict[int, Any] = {}
        try:
            for bucket, chosen in grouped(rows).items():
                found = await self._call(rows, chosen, bucket, OPEN_S_MAX)
                out.update(zip(chosen, found, strict=True))
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"coral answered {error.code().name}: {error.details()}") from error
        return np.stack([out[index] for index in range(len(texts))])

    async def close(self) -> None:
        """Give up the channel."""
        if self._channel is not None:
            await self._channel.close()

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    async def _call(
        self, rows: Sequence[Sequence[int]], chosen: Sequence[int], bucket: int, timeout_s: float
    ) -> Vectors:
        request = request_of([rows[index] for index in chosen], bucket, round(timeout_s * 1000))
        return rows_of(await self._infer(request, timeout=timeout_s), len(chosen))


def grouped(rows: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """The rows of each bucket, by their place; buckets that nobody needs are left out."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(next(bucket for bucket in BUCKETS if len(row) <= bucket), []).append(index)
    return groups


def request_of(rows: Sequence[Sequence[int]], bucket: int, wait_ms: int = WAIT_MS_DEFAULT) -> Any:
    """An ``InferRequest`` for rows of one bucket: int32, row-major, padded to the bucket with zeros."""
    ids: Rows = np.zeros((len(rows), bucket), dtype="<i4")
    mask: Rows = np.zeros((len(rows), bucket), dtype="<i4")
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return InferRequest(
        request_id="loadtest", bucket_max_len=bucket, max_wait_ms=wait_ms, input_ids_bytes=ids.tobytes(),
        attention_mask_bytes=mask.tobytes(), num_items=len(rows), seq_len=bucket,
    )  # fmt: skip


def rows_of(response: Any, count: int) -> Vectors:
    """The vectors of an answer, float32 ``[count, dimensions]``. Raises ``ConnectionError`` where some are missing."""
    given: Vectors = np.frombuffer(response.embeddings_bytes, dtype="<f4")
    if response.status != COMPLETED or not given.size or given.size != count * response.embedding_dim:
        raise ConnectionError(f"coral answered OK with {given.size} floats for {count} texts, status {response.status}")
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
