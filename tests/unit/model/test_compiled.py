"""The compiled pass gives the model's own vectors, whatever the batch, and every failure leaves the model that runs."""

import dataclasses
import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.native import compiler
from embedserve.model.native.compilation import SOURCE, Compilation
from embedserve.model.native.compiler import CannotCompile, compile_library, default_cache
from embedserve.model.native.library import NativeEncoder
from embedserve.model.native.plan import plan_for
from embedserve.model.pipeline import PoolingSpec
from embedserve.model.pooling import Pooling, Segments, token_weights
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.batches import batch_of, cosines
from tests.unit.model.checkpoints import VOCAB_SIZE, save_checkpoint, save_encoder
from tests.unit.model.test_torch_backend import rows

WAIT_S = 120.0
COMPILED = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
LENGTHS = [3, 40, 7, 7, 128, 41, 3, 12, 1, 64, 65]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: the code is the same."""
    try:
        folder = tmp_path_factory.mktemp("compiled")
        compile_library(SOURCE, folder)
    except CannotCompile as reason:
        if "no C++ compiler" in str(reason):
            pytest.skip(f"g++ is not installed: {reason}")
        raise
    return folder


@pytest.fixture(scope="session")
def library(cache: Path) -> Path:
    return compile_library(SOURCE, cache).path


def put(path: Path, content: bytes) -> None:
    """Another file in the place of ``path``, which this process has loaded: to write into that one would end it."""
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(content)
    fresh.chmod(0o700)
    fresh.replace(path)


def backend_of(folder: Path, cache: Path, dtype: str = "float32", **options: Any) -> TorchBackend:
    """A backend whose compiled pass has taken over."""
    backend = TorchBackend(load_checkpoint(str(folder)), dtype=dtype, compiled=True, compile_cache=cache, **options)
    assert backend._compiled is not None
    assert backend._compiled._compilation is not None
    assert backend._compiled._compilation._made.wait(WAIT_S)
    backend.warm_up(512)
    assert backend.report().compiled, backend.report().compile_failure
    return backend


class Oracle:
    """A BERT of some shape by transformers, and its compiled twin."""

    def __init__(self, library: Path, dtype: torch.dtype = torch.float32, lanes: int = 2, **changes: Any) -> None:
        torch.manual_seed(5)
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "max_position_embeddings": 700, "initializer_range": 0.15,
        }  # fmt: skip
        self.model = transformers.BertModel(transformers.BertConfig(**sizes | changes), add_pooling_layer=False).eval()
        for parameter in self.model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            parameter.data = parameter.data.to(dtype)
        self.encoder = NativeEncoder(library, plan_for(self.model, "bert", dtype), lanes)

    def compiled(self, ids: npt.NDArray[np.int32], lengths: list[int]) -> npt.NDArray[np.float32]:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
        weights = np.repeat(1.0 / np.asarray(lengths), lengths).astype(np.float32)[None]
        return self.encoder.run(ids, offsets, positions=positions, pooling=weights)

    def reference(self, ids: npt.NDArray[np.int32], lengths: list[int]) -> npt.NDArray[np.float32]:
        means = []
        with torch.inference_mode():
            for row in np.split(ids, np.cumsum(lengths)[:-1]):
                hidden = self.model(torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state[0]
                means.append(hidden.float().mean(0).numpy())
        return np.stack(means)


def ids_of(lengths: list[int], seed: int = 3) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(5, VOCAB_SIZE, sum(lengths)).astype(np.int32)


class TestVectors:
    @pytest.mark.parametrize("architecture", COMPILED)
    @pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.999)])
    def test_are_those_of_the_model(
        self, tmp_path: Path, cache: Path, architecture: str, dtype: str, least: float
    ) -> None:
        folder = save_encoder(tmp_path, architecture)
        exact = TorchBackend(load_checkpoint(str(folder)), dtype="float32")
        batch = batch_of(LENGTHS)

        vectors = backend_of(folder, cache, dtype).embed(batch).vectors

        assert cosines(vectors, exact.embed(batch).vectors) > least
        assert vectors.flags.c_contiguous
        assert vectors.dtype == np.float32

    @pytest.mark.parametrize(
        "lengths",
        [[1], [2], [16], [17], [255], [256], [257], [512], [513, 700], [33] * 50, [700, 1, 300, 31, 2], [5] * 300],
        ids=str,
    )
    @pytest.mark.parametrize("lanes", [1, 2, 3])
    def test_borders_of_blocks_and_chunks(self, library: Path, lengths: list[int], lanes: int) -> None:
        """Blocks of 32 queries, 64 tokens and 256 keys, chunks of 128 tokens: beside and over each border."""
        oracle = Oracle(library, lanes=lanes)
        ids = ids_of(lengths)

        np.testing.assert_allclose(oracle.compiled(ids, lengths), oracle.reference(ids, lengths), rtol=2e-4, atol=2e-5)

    @pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
    def test_every_activation(self, library: Path, activation: str) -> None:
        oracle = Oracle(library, hidden_act=activation)
        ids = ids_of(LENGTHS)

        np.testing.assert_allclose(oracle.compiled(ids, LENGTHS), oracle.reference(ids, LENGTHS), rtol=2e-4, atol=2e-5)

    @pytest.mark.parametrize(
        ("hidden", "heads", "intermediate"), [(16, 1, 16), (48, 6, 80), (96, 3, 272), (128, 1, 512), (144, 2, 64)]
    )
    def test_widths_that_are_no_powers(self, library: Path, hidden: int, heads: int, intermediate: int) -> None:
        for dtype, least in ((torch.float32, 0.999999), (torch.bfloat16, 0.998)):
            oracle = Oracle(
                library, dtype, hidden_size=hidden, num_attention_heads=heads, intermediate_size=intermediate
            )
            ids = ids_of(LENGTHS)
            assert cosines(oracle.compiled(ids, LENGTHS), oracle.reference(ids, LENGTHS)) > least

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(lengths=st.lists(st.integers(1, 120), min_size=1, max_size=40), seed=st.integers(0, 9))
    def test_any_batch(self, library: Path, lengths: list[int], seed: int) -> None:
        oracle = _shared(library)
        ids = ids_of(lengths, seed)

        together = oracle.compiled(ids, lengths)

        for row, alone in enumerate(np.split(ids, np.cumsum(lengths)[:-1])):
            np.testing.assert_allclose(together[row], oracle.compiled(alone, [lengths[row]])[0], rtol=1e-4, atol=1e-5)

    def test_the_same_batch_gives_the_same_bits(self, library: Path) -> None:
        """Whichever lane takes which chunk."""
        oracle = Oracle(library, torch.bfloat16, lanes=3)
        lengths = [60, 5, 128, 33, 90] * 6
        ids = ids_of(lengths)
        first = oracle.compiled(ids, lengths)

        assert all(np.array_equal(first, oracle.compiled(ids, lengths)) for _ in range(20))

    @pytest.mark.parametrize("heads", [2, 4])
    def test_borders_of_tiles_in_bfloat16(self, library: Path, heads: int) -> None:
        """14 rows, 16 and 32 queries, pairs of keys: beside and over each border, alone and among neighbours."""
        oracle = Oracle(library, torch.bfloat16, hidden_size=128, num_attention_heads=heads, intermediate_size=224)
        lengths = [1, 2, 3, 13, 14, 15, 16, 17, 28, 29, 31, 32, 33, 47, 48, 49, 127, 129, 257, 513]
        ids = ids_of(lengths)
        together = oracle.compiled(ids, lengths)
        alone = [oracle.compiled(row, [row.size])[0] for row in np.split(ids, np.cumsum(lengths)[:-1])]
        oracle.model.float()

        assert cosines(together, oracle.reference(ids, lengths)) > 0.9998
        assert cosines(together, np.stack(alone)) > 0.99999

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("activation", ["gelu", "relu"])
    def test_far_from_zero_an_activation_is_a_line(self, library: Path, dtype: torch.dtype, activation: str) -> None:
        """Beyond the range in which GELU is a polynomial."""
        oracle = Oracle(library, dtype, hidden_act=activation, num_hidden_layers=1)
        layer = oracle.model.encoder.layer[0]
        signs = torch.where(torch.arange(128) % 2 == 0, 1.0, -1.0)
        layer.intermediate.dense.bias.data.copy_(signs * torch.linspace(0, 60, 128))
        oracle.encoder = NativeEncoder(library, plan_for(oracle.model, "bert", dtype), 2)
        ids = ids_of(LENGTHS)
        vectors = oracle.compiled(ids, LENGTHS)
        oracle.model.float()

        assert cosines(vectors, oracle.reference(ids, LENGTHS)) > (0.99999 if dtype is torch.float32 else 0.9998)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_nan_weight_is_seen_in_every_row(self, library: Path, dtype: torch.dtype) -> None:
        """The caller drops rows that are not finite: a NaN that got lost would be served."""
        oracle = Oracle(library, dtype, num_attention_heads=2)
        oracle.model.encoder.layer[0].output.dense.weight.data[3, 5] = float("nan")
        broken = NativeEncoder(library, plan_for(oracle.model, "bert", dtype), 2)
        ids = ids_of(LENGTHS)
        offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
        positions = np.concatenate([np.arange(n) for n in LENGTHS]).astype(np.int32)
        weights = np.repeat(1.0 / np.asarray(LENGTHS), LENGTHS).astype(np.float32)[None]

        assert np.isnan(broken.run(ids, offsets, positions=positions, pooling=weights)).any(axis=1).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_nan_row_leaves_its_neighbours_alone(self, library: Path, dtype: torch.dtype) -> None:
        oracle = Oracle(library, dtype, num_attention_heads=2)
        oracle.model.embeddings.word_embeddings.weight.data[17] = float("nan")
        poisoned = Oracle.__new__(Oracle)
        poisoned.encoder = NativeEncoder(library, plan_for(oracle.model, "bert", dtype), 2)
        lengths = [20, 9, 33, 3]
        ids = ids_of(lengths)
        ids[ids == 17] = 18
        clean = oracle.compiled(ids, lengths)
        ids[22] = 17  # in the second row

        vectors = poisoned.compiled(ids, lengths)

        assert np.isnan(vectors[1]).any()
        np.testing.assert_array_equal(vectors[[0, 2, 3]], clean[[0, 2, 3]])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_left_out_is_the_usual(self, library: Path, dtype: torch.dtype) -> None:
        """Positions from 0, the mean, and no scaling; and a row alone, which its caller computes."""
        oracle = Oracle(library, dtype)
        for lengths in ([12], [32], [33], [20, 9, 33, 3], [1]):
            ids = ids_of(lengths)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            np.testing.assert_allclose(
                oracle.encoder.run(ids, offsets), oracle.compiled(ids, lengths), rtol=1e-6, atol=1e-6
            )

    def test_rows_are_scaled_to_unit_length_where_that_is_asked(self, library: Path) -> None:
        oracle = Oracle(library)
        lengths = [20, 9, 33]
        ids, offsets = ids_of(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        plain = oracle.encoder.run(ids, offsets)
        two_modes = np.stack([np.ones(sum(lengths)), np.full(sum(lengths), 0.5)]).astype(np.float32)
        chosen = np.array([True, False, True])

        vectors = oracle.encoder.run(ids, offsets, normalize=chosen)
        double = oracle.encoder.run(ids, offsets, pooling=two_modes, normalize=chosen)
        nothing = oracle.encoder.run(ids, offsets, pooling=np.zeros((1, ids.size), np.float32), normalize=chosen)

        lengths_of_vectors = np.linalg.norm(plain, axis=1, keepdims=True)
        np.testing.assert_allclose(
            vectors, np.where(chosen[:, None], plain / lengths_of_vectors, plain), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(np.linalg.norm(double, axis=1)[chosen], 1.0, rtol=1e-5)
        assert np.linalg.norm(double[1]) > 2
        assert not nothing.any()

    def test_short_passes_at_once_are_computed_by_one_caller_and_the_lanes(self, library: Path) -> None:
        oracle = Oracle(library)
        batches = [([3 + k], ids_of([3 + k], k)) for k in range(4)]
        wanted = [oracle.compiled(ids, lengths) for lengths, ids in batches]
        wrong: list[int] = []

        def call(k: int) -> None:
            lengths, ids = batches[k]
            for _ in range(200):
                if not np.array_equal(oracle.compiled(ids, lengths), wanted[k]):
                    wrong.append(k)

        threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    @pytest.mark.parametrize("lanes", [1, 2, 4])
    def test_many_passes_at_once(self, library: Path, lanes: int) -> None:
        """They share the lanes, and each caller gets its own rows."""
        oracle = Oracle(library, lanes=lanes)
        batches = [([7 + k, 30, 5 * k + 1], ids_of([7 + k, 30, 5 * k + 1], k)) for k in range(8)]
        wanted = [oracle.compiled(ids, lengths) for lengths, ids in batches]
        wrong: list[int] = []

        def call(k: int) -> None:
            lengths, ids = batches[k]
            wrong.extend(k for _ in range(20) if not np.array_equal(oracle.compiled(ids, lengths), wanted[k]))

        threads = [threading.Thread(target=call, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)

        assert not wrong

    def test_python_runs_meanwhile(self, library: Path) -> None:
        """The lock is free for the whole pass: another thread's turns go on while it runs."""
        oracle = Oracle(library, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, lanes=1)
        lengths = [512] * 8
        ids = ids_of(lengths)
        begun, done, turns = threading.Event(), threading.Event(), 0

        def spin() -> None:
            begun.wait(WAIT_S)
            oracle.compiled(ids, lengths)
            done.set()

        thread = threading.Thread(target=spin)
        thread.start()
        begun.set()
        while not done.is_set():
            turns += 1
        thread.join(WAIT_S)

        assert turns > 1000


@pytest.fixture(autouse=True, scope="module")
def forget_shared() -> Iterator[None]:
    yield
    _ORACLES.clear()


_ORACLES: dict[Path, Oracle] = {}


def _shared(library: Path) -> Oracle:
    return _ORACLES.setdefault(library, Oracle(library))


class TestPooling:
    @pytest.mark.parametrize(
        "modes",
        [("mean",), ("cls",), ("last_token",), ("mean_sqrt_len",), ("weighted_mean",), ("cls", "mean")],
        ids=str,
    )
    @pytest.mark.parametrize("control", [(), (7, 8, 9)], ids=["plain", "control tokens"])
    @pytest.mark.parametrize("skips", [False, True], ids=["whole", "prompt left out"])
    def test_weights_pool_as_the_module_does(
        self, modes: tuple[str, ...], control: tuple[int, ...], skips: bool
    ) -> None:
        rng = np.random.default_rng(1)
        lengths = np.array([4, 1, 9, 3, 30])
        ids = rng.integers(5, 12, lengths.sum())
        ids[4] = 7  # a row of one control token
        skip = np.array([2, 1, 0, 5, 3]) if skips else None
        hidden = torch.from_numpy(rng.standard_normal((ids.size, 6)).astype(np.float32))
        starts = np.cumsum(lengths) - lengths
        segments = Segments(
            *(torch.from_numpy(x) for x in (ids, starts, lengths, np.repeat(np.arange(5), lengths))),
            None if skip is None else torch.from_numpy(skip),
        )
        wanted = Pooling(PoolingSpec(modes), control)(hidden, segments).numpy()

        weights = token_weights(modes, np.asarray(control, np.int64), ids, lengths, skip)

        assert weights is not None
        rows_of = np.repeat(np.arange(5), lengths)
        pooled = np.stack(
            [
                np.concatenate([weights[m, rows_of == r] @ hidden.numpy()[rows_of == r] for m in range(len(modes))])
                for r in range(5)
            ]
        )
        np.testing.assert_allclose(pooled, wanted, rtol=1e-5, atol=1e-6)

    def test_a_maximum_is_no_weighted_sum(self) -> None:
        assert token_weights(("mean", "max"), np.zeros(0, np.int64), np.arange(3), np.array([3]), None) is None

    @pytest.mark.parametrize("modes", ["cls", "weightedmean", ["cls", "mean"]], ids=str)
    def test_checkpoint_with_other_pooling(self, tmp_path: Path, cache: Path, modes: Any) -> None:
        folder = save_checkpoint(tmp_path, pooling=modes, normalize=False)
        batch = dataclasses.replace(batch_of(LENGTHS), skip=np.array([0, 3, 2, 9, 0, 1, 0, 2, 0, 60, 0], np.int32))
        exact = TorchBackend(load_checkpoint(str(folder)), dtype="float32")

        backend = backend_of(folder, cache, control_tokens=())

        np.testing.assert_allclose(backend.embed(batch).vectors, exact.embed(batch).vectors, rtol=1e-4, atol=1e-5)


class TestTakeOver:
    def test_a_model_without_a_compiled_form_goes_on_as_it_is(self, tmp_path: Path, cache: Path) -> None:
        for architecture, reason in (("modernbert", "does not know the architecture"), ("electra", "no projection")):
            folder = save_encoder(tmp_path / architecture, architecture)
            backend = TorchBackend(load_checkpoint(str(folder)), dtype="float32", compiled=True, compile_cache=cache)

            backend.warm_up(256)

            assert reason in _failure(backend)
            assert not backend.report().compiled
            assert backend.embed(batch_of([3, 5])).vectors.shape[0] == 2

    def test_pooling_by_maximum_goes_on_as_it_is(self, tmp_path: Path, cache: Path) -> None:
        folder = save_checkpoint(tmp_path, pooling="max")
        backend = TorchBackend(load_checkpoint(str(folder)), dtype="float32", compiled=True, compile_cache=cache)
        backend.warm_up(256)

        assert "a maximum is none" in _failure(backend)

    def test_other_vectors_are_not_served(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = save_encoder(tmp_path, "bert")
        run = NativeEncoder.run
        monkeypatch.setattr(NativeEncoder, "run", lambda *given, **named: np.roll(run(*given, **named), 1, axis=1))
        backend = TorchBackend(load_checkpoint(str(folder)), dtype="float32", compiled=True, compile_cache=cache)
        backend.warm_up(256)

        assert "gives other vectors" in _failure(backend)
        assert not backend.report().compiled

    def test_it_takes_over_while_serving(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A slow compiler: passes run by the model until it has ended, and give the same vectors after."""
        go = threading.Event()
        compiling = compile_library

        def slow(source: Path, folder: Path) -> Any:
            go.wait(WAIT_S)
            return compiling(source, folder)

        monkeypatch.setattr("embedserve.model.native.compilation.compile_library", slow)
        folder = save_encoder(tmp_path, "bert")
        backend = TorchBackend(load_checkpoint(str(folder)), dtype="float32", compiled=True, compile_cache=cache)
        backend.warm_up(256)
        before = backend.embed(batch_of(LENGTHS)).vectors
        assert not backend.report().compiled
        go.set()
        assert backend._compiled is not None
        compilation = backend._compiled._compilation
        assert compilation is not None
        assert compilation.end(WAIT_S) is not None

        after = backend.embed(batch_of(LENGTHS)).vectors

        report = backend.report()
        assert report.compiled
        assert report.compile_s > 0
        assert report.compile_failure == ""
        assert cosines(before, after) > 0.999999

    def test_a_padded_pass_stays_the_models_own(self, tmp_path: Path, cache: Path) -> None:
        backend = backend_of(save_encoder(tmp_path, "bert"), cache)
        batch = batch_of(LENGTHS)

        padded = backend.embed(dataclasses.replace(batch, pad_to=128)).vectors

        assert cosines(padded, backend.embed(batch).vectors) > 0.999999

    def test_rows_are_checked_before_they_reach_machine_code(self, tmp_path: Path, cache: Path) -> None:
        backend = backend_of(save_encoder(tmp_path, "bert"), cache)
        batch = batch_of([3, 4])
        batch.ids[5] = VOCAB_SIZE

        with pytest.raises(ValueError, match="row 1 has the token id 600"):
            backend.embed(batch)

    def test_neighbours_do_not_change_a_vector(self, tmp_path: Path, cache: Path) -> None:
        backend = backend_of(save_encoder(tmp_path, "roberta"), cache, "bfloat16", threads=2)
        batch = batch_of([40, 7, 128, 12, 3, 77])
        together = backend.embed(batch).vectors

        for row in range(6):
            alone = backend.embed(rows(batch, [row], None)).vectors
            assert cosines(together[row : row + 1], alone) > 0.9999


def _failure(backend: TorchBackend) -> str:
    """Why nothing was compiled, once that is known."""
    assert backend._compiled is not None
    if backend._compiled._compilation is not None:
        backend._compiled._compilation.end(WAIT_S)
    backend.embed(batch_of([3]))
    return backend.report().compile_failure


class TestCompiler:
    def test_the_second_start_finds_the_code(self, tmp_path: Path, cache: Path) -> None:
        assert compile_library(SOURCE, cache).cached

    def test_another_source_is_another_library(self, tmp_path: Path) -> None:
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')
        first = compile_library(source, tmp_path / "kept")
        source.write_text('extern "C" int one() { return 2; }')
        second = compile_library(source, tmp_path / "kept")

        assert not first.cached
        assert not second.cached
        assert first.path != second.path
        assert compile_library(source, tmp_path / "kept") == dataclasses.replace(second, cached=True)

    def test_only_the_latest_are_kept(self, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir(mode=0o700)
        for k in range(compiler.KEPT_MAX + 3):
            (kept / f"one-{k}.so").touch()
            os.utime(kept / f"one-{k}.so", (k, k))
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')

        made = compile_library(source, kept)

        left = {path.name for path in kept.glob("*.so")}
        assert len(left) == compiler.KEPT_MAX
        assert made.path.name in left
        assert "one-0.so" not in left

    @pytest.mark.parametrize("size", [0, 4096, 12_000])
    def test_one_that_was_cut_short_is_built_anew(self, tmp_path: Path, size: int) -> None:
        """To load it would end the process: a truncated library is mapped, and faults when it is touched."""
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')
        whole = compile_library(source, tmp_path / "kept").path
        content = whole.read_bytes()
        assert len(content) > size
        put(whole, content[:size])

        again = compile_library(source, tmp_path / "kept")

        assert not again.cached
        assert again.path.read_bytes() == content
        assert compile_library(source, tmp_path / "kept").cached

    def test_one_that_no_seal_vouches_for_is_built_anew(self, tmp_path: Path) -> None:
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')
        compile_library(source, tmp_path / "kept").path.with_suffix(".sha256").unlink()

        assert not compile_library(source, tmp_path / "kept").cached

    def test_a_machine_without_a_compiler_uses_what_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')
        compile_library(source, tmp_path / "kept")
        monkeypatch.setenv("PATH", str(tmp_path))

        assert compile_library(source, tmp_path / "kept").cached

    def test_a_cache_that_can_only_be_read_serves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')
        compile_library(source, tmp_path / "kept")
        monkeypatch.setattr("os.utime", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))

        assert compile_library(source, tmp_path / "kept").cached

    def test_what_no_loader_takes_is_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "true")

        with pytest.raises(CannotCompile, match="what was compiled cannot be loaded"):
            compile_library(SOURCE, tmp_path / "kept")
        assert list((tmp_path / "kept").iterdir()) == []

    def test_what_a_killed_build_left_is_removed(self, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir(mode=0o700)
        old, young = kept / ".one-abc.so", kept / ".one-def.so"
        old.touch()
        os.utime(old, (1, 1))
        young.touch()
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')

        compile_library(source, kept)

        assert not old.exists()
        assert young.exists(), "somebody may be building it"

    def test_a_full_disk_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = tmp_path / "cxx"
        script.write_text(
            "#!/bin/sh\n"
            "echo 'ld: final link failed: No space left on device' >&2; echo 'collect2: error: ld' >&2; exit 1\n"
        )
        script.chmod(0o700)
        monkeypatch.setenv("CXX", str(script))

        with pytest.raises(CannotCompile, match="No space left on device"):
            compile_library(SOURCE, tmp_path / "kept")

    def test_a_compiler_command_that_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "g++ '")

        with pytest.raises(CannotCompile, match="CXX is no command"):
            compile_library(SOURCE, tmp_path / "kept")

    def test_a_source_that_does_not_compile(self, tmp_path: Path) -> None:
        source = tmp_path / "one.cpp"
        source.write_text("int one() { return }")

        with pytest.raises(CannotCompile, match=r"ended with 1: .*error"):
            compile_library(source, tmp_path / "kept")
        assert list((tmp_path / "kept").iterdir()) == []

    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)

        with pytest.raises(CannotCompile, match=r"no C\+\+ compiler was found .*; install g\+\+"):
            compile_library(SOURCE, tmp_path / "kept")

    def test_cxx_names_the_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler -O1")

        with pytest.raises(CannotCompile, match="no-such-compiler"):
            compile_library(SOURCE, tmp_path / "kept")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(CannotCompile, match=r"cannot be made: .*; set model\.compile_cache"):
                compile_library(SOURCE, tmp_path / "kept")
        finally:
            tmp_path.chmod(0o700)

    def test_a_cache_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "kept").touch()

        with pytest.raises(CannotCompile, match=r"cannot be made: .*; set model\.compile_cache"):
            compile_library(SOURCE, tmp_path / "kept")

    @pytest.mark.parametrize("mode", [0o770, 0o707])
    def test_a_folder_that_others_may_write_is_not_trusted(self, tmp_path: Path, mode: int) -> None:
        """What lies there is run in the server's name."""
        folder = tmp_path / "kept"
        folder.mkdir()
        folder.chmod(mode)

        with pytest.raises(CannotCompile, match="can be written by others"):
            compile_library(SOURCE, folder)

    def test_a_library_that_others_may_write_is_not_trusted(self, tmp_path: Path) -> None:
        source = tmp_path / "one.cpp"
        source.write_text('extern "C" int one() { return 1; }')
        made = compile_library(source, tmp_path / "kept").path
        assert stat.S_IMODE(made.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH) == 0
        made.chmod(0o766)

        with pytest.raises(CannotCompile, match="can be written by others"):
            compile_library(source, tmp_path / "kept")

    def test_a_library_that_is_damaged_is_refused(self, tmp_path: Path) -> None:
        damaged = tmp_path / "encoder.so"
        damaged.write_bytes(b"\x7fELF, but no more")
        model = transformers.BertModel(
            transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                    intermediate_size=16)
        )  # fmt: skip

        with pytest.raises(CannotCompile, match="cannot be loaded"):
            NativeEncoder(damaged, plan_for(model, "bert", torch.float32), 1)

    def test_the_default_cache_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
        assert default_cache() == Path("/somewhere/cache/embedserve")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", "/home/someone")
        assert default_cache() == Path("/home/someone/.cache/embedserve")

    def test_no_warning_of_the_compiler(self, tmp_path: Path, cache: Path) -> None:
        command = [*compiler._compiler(), "-Wall", "-Wextra", "-Werror", "-std=c++17", "-fopenmp-simd", "-fsyntax-only"]
        done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


class TestPlan:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"hidden_size": 24, "num_attention_heads": 2}, "widths in steps of 16"),
            ({"intermediate_size": 100}, "widths in steps of 16"),
            ({"hidden_size": 48, "num_attention_heads": 16}, "even heads"),
            ({"hidden_act": "mish"}, "no activation 'mish'"),
        ],
    )
    def test_shapes_that_are_not_compiled(self, changes: dict[str, Any], reason: str) -> None:
        sizes = {"vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(**sizes | {"intermediate_size": 64} | changes)

        with pytest.raises(CannotCompile, match=reason):
            plan_for(transformers.BertModel(config), "bert", torch.float32)

    def test_half_precision_is_not_compiled(self) -> None:
        with pytest.raises(CannotCompile, match=r"not in torch\.float16"):
            plan_for(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)), "bert", torch.float16)


class TestCompilation:
    def test_any_error_is_told_and_ends_the_attempt(self, cache: Path) -> None:
        def broken() -> Any:
            raise CannotCompile("no plan")

        compilation = Compilation(broken, cache=cache, lanes=1)
        end = compilation.end(WAIT_S)

        assert end is not None
        assert end.encoder is None
        assert end.why == "no plan"
        assert compilation.is_made

    def test_a_kept_library_that_cannot_be_loaded_is_built_anew(self, tmp_path: Path, cache: Path) -> None:
        """As where another file was put in its place, seal and all."""
        folder = tmp_path / "kept"
        kept = compile_library(SOURCE, folder).path
        put(kept, b"not a library")
        kept.with_suffix(".sha256").write_text(hashlib.sha256(b"not a library").hexdigest())
        model = transformers.BertModel(
            transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                    intermediate_size=16)
        )  # fmt: skip
        compilation = Compilation(lambda: plan_for(model, "bert", torch.float32), cache=folder, lanes=1)
        compilation.judge_with(lambda _encoder: None)
        end = compilation.end(WAIT_S)

        assert end is not None
        assert end.encoder is not None, end.why
        assert not end.cached


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from embedserve.model.native.compiler import CannotCompile
from embedserve.model.native.library import NativeEncoder, Plan

def zeros(*shape):
    return torch.zeros(shape)

layer = tuple(zeros(*shape) for shape in (
    (48, 16), (48,), (16, 16), (16,), (16,), (16,), (32, 16), (32,), (16, 32), (16,), (16,), (16,)))
plan = Plan(16, 1, 32, 0, 1e-12, torch.float32, zeros(4, 16), zeros(4, 16), (zeros(16), zeros(16)), (layer,))
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)
try:
    NativeEncoder(Path(sys.argv[1]), plan, 256)
except CannotCompile as refused:
    print("refused:", refused)
"""


class TestLimits:
    def test_a_thread_that_cannot_be_started_is_told(self, library: Path) -> None:
        """In a process of its own: the machine code used to end it."""
        told = subprocess.run(
            [sys.executable, "-c", LIMITED, str(library)], capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert (told.returncode, told.stdout[:8]) == (0, "refused:"), told.stderr

    def test_a_second_pass_is_taken_once_it_is_compiled(self, tmp_path: Path, cache: Path) -> None:
        """Before that it would only wait, past the moment in which somebody may still not want it."""
        folder = save_checkpoint(tmp_path)
        waiting = TorchBackend(
            load_checkpoint(str(folder)), dtype="float32", compiled=True, compile_cache=tmp_path / "none"
        )
        assert waiting.passes_at_once == 1
        assert TorchBackend(load_checkpoint(str(folder)), dtype="float32").passes_at_once == 1
        assert backend_of(folder, cache).passes_at_once == 2


DEFINED = """
#include "encoder.cpp"

namespace at::native::cpublas {
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*,
            const c10::BFloat16*, float*, bool) {}
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*, bool) {}
void brgemm_release(bool) {}
}  // namespace at::native::cpublas

int main() {
  const float nan = std::nanf("");
  if (!std::isnan(exponential(nan)) || !std::isnan(activated<SILU>(nan)) || !std::isnan(activated<GELU>(nan))) return 1;
  float worst = 0;
  for (float x = -120.0f; x <= 88.0f; x += 0.01f) {
    const float true_value = x < -87.0f ? 0.0f : std::exp(x);
    const float value = exponential(x);
    if (true_value == 0.0f ? value != 0.0f : !(value > 0.0f)) return 2;
    if (true_value > 0.0f) worst = std::max(worst, std::fabs(value / true_value - 1.0f));
  }
  const float infinity = HUGE_VALF;
  if (exponential(-infinity) != 0.0f || !(exponential(infinity) > 1e38f)) return 3;
  return worst < 1e-5f ? 0 : 4;
}
"""


class TestNumbers:
    def test_the_exponential_is_defined_for_every_number_and_for_none(self, tmp_path: Path) -> None:
        """Built to stop at a conversion or a shift that the language leaves open; a NaN stays one."""
        try:
            command = compiler._compiler()
        except CannotCompile as reason:
            pytest.skip(f"no compiler: {reason}")
        source, program = tmp_path / "defined.cpp", tmp_path / "defined"
        source.write_text(DEFINED)
        flags = [
            "-std=c++17", "-O0", "-pthread", "-fopenmp-simd", f"-I{SOURCE.parent}",
            "-fsanitize=undefined,float-cast-overflow", "-fsanitize-undefined-trap-on-error",
        ]  # fmt: skip

        subprocess.run([*command, *flags, str(source), "-o", str(program)], check=True, capture_output=True)

        assert subprocess.run([str(program)], check=False).returncode == 0
