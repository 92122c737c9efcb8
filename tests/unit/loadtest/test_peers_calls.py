"""How each peer is called and started: messages as its own contract says, and every ending told as a status.

``coral_inference.binpb`` is the file descriptor that coral-gpu-inference 0.1.0 (Apache-2.0) carries in its generated
code.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
from aiohttp import web
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from loadtest.peers import coral_proto, encode_loop
from loadtest.peers.coral import BUCKETS, TOKENS_MAX, Coral, CoralTarget, grouped, request_of, rows_of
from loadtest.peers.embedserve import Embedserve
from loadtest.peers.infinity import Infinity, InfinityTarget, status_of, vectors_of
from loadtest.peers.peer import HOST, Peer
from loadtest.peers.sentence_transformers import EncodeTarget, SentenceTransformers

DESCRIPTOR = (Path(__file__).parent / "coral_inference.binpb").read_bytes()
WORDS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Coral's own messages, built of its own descriptor."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(DESCRIPTOR))
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"gpu_inference.{name}"))
        for name in ("InferRequest", "InferResponse")
    }


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a word, between [CLS] and [SEP]."""
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=128)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


class TestCoralProto:
    def test_what_we_speak_is_what_the_package_says(self) -> None:
        assert coral_proto.differences(DESCRIPTOR) == []

    def test_another_number_a_missing_field_and_another_service_are_told(self) -> None:
        file = descriptor_pb2.FileDescriptorProto.FromString(DESCRIPTOR)
        request = next(message for message in file.message_type if message.name == "InferRequest")
        next(field for field in request.field if field.name == "seq_len").number = 19
        del request.field[0]
        file.service[0].name = "Other"

        found = coral_proto.differences(file.SerializeToString())

        assert len(found) == 3
        assert [sentence.split()[0] for sentence in found[:2]] == ["InferRequest.request_id", "InferRequest.seq_len"]
        assert found[2] == "there is no /gpu_inference.InferenceService/Infer"

    def test_the_descriptor_is_read_from_generated_code_that_is_not_run(self, tmp_path: Path) -> None:
        generated = tmp_path / "inference_pb2.py"
        generated.write_text(
            f"raise SystemExit('run')\nDESCRIPTOR = pool.Default().AddSerializedFile({DESCRIPTOR!r})\n"
        )
        assert coral_proto.installed_descriptor(generated) == DESCRIPTOR

    def test_code_without_one_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "empty.py").write_text("x = 1\n")
        with pytest.raises(ValueError, match="holds no serialised descriptor"):
            coral_proto.installed_descriptor(tmp_path / "empty.py")

    def test_the_process_wide_pool_stays_clean(self) -> None:
        with pytest.raises(KeyError):
            descriptor_pool.Default().FindMessageTypeByName("gpu_inference.InferRequest")


class TestCoralMessages:
    def test_a_request_is_read_by_its_own_proto(self, theirs: dict[str, Any]) -> None:
        request = theirs["InferRequest"].FromString(request_of([[2, 9, 3], [2, 3]], 16, 1500))

        assert (request.num_items, request.seq_len, request.bucket_max_len) == (2, 16, 16)
        assert request.max_wait_ms == 1500
        ids = np.frombuffer(request.input_ids_bytes, dtype="<i4").reshape(2, 16)
        mask = np.frombuffer(request.attention_mask_bytes, dtype="<i4").reshape(2, 16)
        assert ids[0, :4].tolist() == [2, 9, 3, 0]
        assert mask.sum(1).tolist() == [3, 2]
        assert request.ByteSize() == len(request_of([[2, 9, 3], [2, 3]], 16, 1500))

    def test_an_answer_of_its_own_proto_is_read(self, theirs: dict[str, Any]) -> None:
        vectors = np.arange(6, dtype="<f4").reshape(2, 3)
        answer = theirs["InferResponse"](request_id="x", embeddings_bytes=vectors.tobytes(), embedding_dim=3)
        answer.timings.total_ms = 4.0

        assert rows_of([answer.SerializeToString()], 2).tolist() == vectors.tolist()

    @pytest.mark.parametrize(
        "fields",
        [
            {"embeddings_bytes": bytes(12), "embedding_dim": 3},
            {"embeddings_bytes": bytes(24), "embedding_dim": 3, "status": 1},
            {"embedding_dim": 3},
        ],
        ids=["a row is missing", "an error inside OK", "nothing"],
    )
    def test_an_ok_without_its_vectors_is_no_answer(self, theirs: dict[str, Any], fields: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="for 2 texts"):
            rows_of([theirs["InferResponse"](**fields).SerializeToString()], 2)

    def test_rows_go_to_the_smallest_bucket_that_holds_them(self) -> None:
        lengths = (1, 16, 17, 32, 256, 512)
        assert grouped([[1] * length for length in lengths]) == {16: [0, 1], 32: [2, 3], 256: [4], 512: [5]}
        assert max(BUCKETS) >= TOKENS_MAX


Handler = Callable[[Any], Awaitable[Any]]


@asynccontextmanager
async def coral_server(theirs: dict[str, Any], handle: Handler) -> AsyncIterator[str]:
    """A server of coral's contract, which checks what coral would choke on."""

    async def infer(message: bytes, context: Any) -> bytes:
        request = theirs["InferRequest"].FromString(message)
        assert request.seq_len == request.bucket_max_len
        assert len(request.input_ids_bytes) == 4 * request.num_items * request.seq_len
        answer: bytes = (await handle(request, context)).SerializeToString()  # type: ignore[call-arg]
        return answer

    server = grpc.aio.server()
    methods = {"Infer": grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("gpu_inference.InferenceService", methods)])
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(0)


class TestCoralTarget:
    async def test_each_text_gets_its_vector_however_they_are_split(
        self, theirs: dict[str, Any], tokenizer_file: Path
    ) -> None:
        """The vector of a row is its number of tokens, so that a wrong order shows."""
        asked: list[int] = []

        async def lengths(request: Any, _context: Any) -> Any:
            asked.append(request.bucket_max_len)
            mask = np.frombuffer(request.attention_mask_bytes, dtype="<i4").reshape(request.num_items, -1)
            rows = np.repeat(mask.sum(1, keepdims=True), 2, axis=1).astype("<f4")
            return theirs["InferResponse"](embeddings_bytes=rows.tobytes(), embedding_dim=2)

        texts = ["a b", "a " * 20, "c", "b " * 900, "d " * 14]
        async with coral_server(theirs, lengths) as address:
            target = CoralTarget(address, tokenizer_file)
            await target.open()
            vectors = await target.vectors(texts)
            reply = await target.embed(texts, timeout_s=5)
            await target.close()

        assert vectors[:, 0].tolist() == [4, 22, 3, TOKENS_MAX, 16]
        assert sorted(asked) == [16, 16, 32, 32, 256, 256]
        assert (reply.status, reply.items, reply.tokens) == ("OK", 5, 4 + 22 + 3 + TOKENS_MAX + 16)

    async def test_one_refused_part_refuses_the_call(self, theirs: dict[str, Any], tokenizer_file: Path) -> None:
        async def shed(request: Any, context: Any) -> Any:
            if request.bucket_max_len == 32:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server overloaded")
            rows = np.ones((request.num_items, 2), dtype="<f4")
            return theirs["InferResponse"](embeddings_bytes=rows.tobytes(), embedding_dim=2)

        async with coral_server(theirs, shed) as address:
            target = CoralTarget(address, tokenizer_file)
            await target.open()
            whole = await target.embed(["a", "b"], timeout_s=5)
            mixed = await target.embed(["a", "b " * 20], timeout_s=5)
            with pytest.raises(ConnectionError, match="RESOURCE_EXHAUSTED"):
                await target.vectors(["b " * 20])
            await target.close()

        assert (whole.status, mixed.status, mixed.items) == ("OK", "RESOURCE_EXHAUSTED", 0)

    async def test_an_answer_that_never_comes_ends_at_the_deadline(
        self, theirs: dict[str, Any], tokenizer_file: Path
    ) -> None:
        async def never(_request: Any, _context: Any) -> Any:
            await asyncio.Event().wait()

        async with coral_server(theirs, never) as address:
            target = CoralTarget(address, tokenizer_file)
            await target.open()
            reply = await target.embed(["a"], timeout_s=0.05)
            await target.close()

        assert reply.status == "DEADLINE_EXCEEDED"

    async def test_nobody_there_is_a_sentence(self, tokenizer_file: Path) -> None:
        target = CoralTarget(f"{HOST}:1", tokenizer_file)
        with pytest.raises(ConnectionError, match="cannot be reached"):
            await target.open()


@asynccontextmanager
async def http_server(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"unix": 1})

    app = web.Application()
    app.add_routes([web.get("/health", health), web.post("/embeddings", handle)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0)
    await site.start()
    try:
        yield f"{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def embedding_list(rows: list[list[float]], order: list[int]) -> bytes:
    """An OpenAI-like answer, its entries in any order."""
    packed = [base64.b64encode(np.array(row, dtype="<f4").tobytes()).decode() for row in rows]
    return orjson.dumps({"data": [{"index": index, "embedding": packed[index]} for index in order]})


class TestInfinityTarget:
    async def test_texts_go_as_json_and_vectors_come_as_base64(self) -> None:
        seen: list[Any] = []

        async def handle(request: web.Request) -> web.Response:
            seen.append(await request.json())
            count = len(seen[-1]["input"])
            rows = [[float(index), 1.0] for index in range(count)]
            return web.Response(body=embedding_list(rows, list(reversed(range(count)))))

        async with http_server(handle) as address:
            target = InfinityTarget(address)
            await target.open()
            vectors = await target.vectors(["one", "two", "three"])
            reply = await target.embed(["one", "two"], timeout_s=5)
            await target.close()

        assert vectors.tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
        assert (reply.status, reply.items) == ("OK", 2)
        assert seen[1] == {"model": "loadtest", "input": ["one", "two"], "encoding_format": "base64"}

    @pytest.mark.parametrize(("http", "status"), [(429, "RESOURCE_EXHAUSTED"), (500, "INTERNAL"), (418, "UNKNOWN")])
    async def test_a_refusal_is_the_nearest_status(self, http: int, status: str) -> None:
        async def handle(_request: web.Request) -> web.Response:
            return web.Response(status=http)

        async with http_server(handle) as address:
            target = InfinityTarget(address)
            await target.open()
            reply = await target.embed(["x"], timeout_s=5)
            with pytest.raises(ConnectionError, match=f"HTTP {http}"):
                await target.vectors(["x"])
            await target.close()

        assert reply.status == status
        assert status_of(http) == status

    async def test_an_answer_that_never_comes_ends_at_the_deadline(self) -> None:
        async def handle(_request: web.Request) -> web.Response:
            await asyncio.sleep(0.2)
            return web.Response()

        async with http_server(handle) as address:
            target = InfinityTarget(address)
            await target.open()
            reply = await target.embed(["x"], timeout_s=0.05)
            await target.close()

        assert reply.status == "DEADLINE_EXCEEDED"

    async def test_an_ok_without_its_vectors_is_an_error(self) -> None:
        async def handle(_request: web.Request) -> web.Response:
            return web.Response(body=embedding_list([[1.0]], [0]))

        async with http_server(handle) as address:
            target = InfinityTarget(address)
            await target.open()
            reply = await target.embed(["x", "y"], timeout_s=5)
            await target.close()

        assert reply.status == "INTERNAL"

    @pytest.mark.parametrize("body", [b"", b"[]", b'{"data":[{"index":0}]}', b'{"data":[{"index":0,"embedding":"!"}]}'])
    def test_anything_else_is_refused(self, body: bytes) -> None:
        with pytest.raises(ConnectionError, match="infinity"):
            vectors_of(body, 1)


class FakeModel:
    """Its vectors are the lengths of the texts."""

    def encode(self, texts: list[str], **_options: Any) -> Any:
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


@asynccontextmanager
async def loop_server() -> AsyncIterator[str]:
    """``encode_loop.answer`` behind asyncio, so that no thread is needed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (size,) = struct.unpack("!I", await reader.readexactly(4))
                body = encode_loop.answer(FakeModel(), json.loads(await reader.readexactly(size)), 32)
                writer.write(struct.pack("!I", len(body)) + body)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    async with server:
        yield f"{HOST}:{server.sockets[0].getsockname()[1]}"


class TestEncodeTarget:
    async def test_many_calls_at_once_get_their_own_vectors(self) -> None:
        async with loop_server() as address:
            target = EncodeTarget(address)
            await target.open()
            found = await asyncio.gather(*(target.vectors(["x" * size, "y"]) for size in range(1, 9)))
            reply = await target.embed(["x", "yy"], timeout_s=5)
            await target.close()

        assert [rows[0, 0] for rows in found] == list(range(1, 9))
        assert (reply.status, reply.items) == ("OK", 2)

    async def test_offline_and_the_cost_of_the_loop_are_told(self) -> None:
        async with loop_server() as address:
            target = EncodeTarget(address)
            await target.open()
            assert await target.offline(["x"] * 100, 32) > 0
            assert 0 < await target.loop_cost_us(["x"]) < 1e6
            await target.close()

    async def test_a_loop_that_has_ended_is_unavailable(self) -> None:
        async with loop_server() as address:
            pass
        target = EncodeTarget(address)
        assert (await target.embed(["x"], timeout_s=1)).status == "UNAVAILABLE"
        with pytest.raises(ConnectionError, match="did not answer"):
            await target.open()


PEERS: tuple[type[Peer], ...] = (Coral, Infinity, SentenceTransformers, Embedserve)


class TestLaunch:
    @pytest.fixture
    def python(self, tmp_path: Path) -> Path:
        """An environment as far as a launch looks at it."""
        package = tmp_path / "lib" / "python3.11" / "site-packages" / "coral_gpu_inference"
        package.mkdir(parents=True)
        (package / "inference_pb2.py").write_text(f"x = pool.AddSerializedFile({DESCRIPTOR!r})\n")
        return tmp_path / "bin" / "python"

    @pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
    def test_every_variant_starts_by_its_interpreter_on_its_port(self, peer: type[Peer], python: Path) -> None:
        for variant in peer.variants:
            launch = peer(variant).launch(python, Path("/a/model"), 12_345)
            said = " ".join([*launch.command, *launch.env.values()])
            assert launch.command[0].startswith(str(python.parent))
            assert "12345" in said
            assert "/a/model" in said

    def test_coral_has_its_metrics_off_and_a_contract_that_is_checked(self, python: Path) -> None:
        env = Coral().launch(python, Path("/a/model"), 1).env
        assert (env["METRICS_ENABLED"], env["GRPC_HOST"]) == ("false", HOST)
        generated = next(python.parent.parent.rglob("inference_pb2.py"))
        generated.write_text("x = pool.AddSerializedFile(b'')\n")
        with pytest.raises(RuntimeError, match="another proto"):
            Coral().launch(python, Path("/a/model"), 1)

    @pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
    def test_infinity_takes_the_dtype_that_embedserve_would(
        self, python: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: str
    ) -> None:
        monkeypatch.setattr("loadtest.peers.infinity.multiplies_bfloat16", lambda: fast)
        command = Infinity().launch(python, Path("/a/model"), 1).command
        assert command[command.index("--dtype") + 1] == dtype

    def test_infinity_has_its_telemetry_off(self, python: Path) -> None:
        launch = Infinity("bfloat16").launch(python, Path("/a/model"), 1)
        assert launch.env["DO_NOT_TRACK"] == "1"
        assert launch.command[launch.command.index("--dtype") + 1] == "bfloat16"

    @pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
    def test_a_client_can_be_handed_to_another_process(self, peer: type[Peer]) -> None:
        target = pickle.loads(pickle.dumps(peer().target))(f"{HOST}:1", Path("/a/model"))
        assert type(target) is type(peer().target(f"{HOST}:1", Path("/a/model")))

    def test_an_unknown_variant_is_a_sentence_with_those_there_are(self) -> None:
        with pytest.raises(ValueError, match="coral has no variant 'int4'; it has float32"):
            Coral("int4")
        assert Coral().label == "coral"
        assert Coral("bfloat16").label == "coral:bfloat16"
