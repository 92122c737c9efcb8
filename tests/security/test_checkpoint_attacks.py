"""A checkpoint that means harm, or is damaged: refused with a sentence, or served; never run, never a hang.

``FUZZ_SECONDS`` in the environment mutates for so long with fresh seeds, instead of the fixed ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedserve.errors import ModelRefused, StartupError
from embedserve.model.checkpoint import load_checkpoint
from tests.integration.server.process import ROOT, environment
from tests.security.fuzz_checkpoint import serve
from tests.unit.model.checkpoints import save_checkpoint

SEEDS = 64
"""Eight for each kind of file."""
FUZZ_S = os.environ.get("FUZZ_SECONDS")
GROWTH_MIB_MAX = 300
TEMPLATE_OF_NOTHING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
"""Names a token that it does not define: Rust panics when a text is tokenised."""
EVIL = "raise SystemExit('code of a checkpoint was run')\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("good"), prompts={"query": "query: "}, default_prompt_name="query")


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def nothing_of_it_is_imported(tmp_path: Path) -> Iterator[None]:
    """Neither a module of this process lies in the checkpoint, nor was a file of it compiled."""
    yield
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        assert file is None or not Path(file).is_relative_to(tmp_path), f"{file} was imported"
    assert not list(tmp_path.rglob("*.pyc"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class TestCode:
    """Files that can run code are refused by name, or lie there unread."""

    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_auto_map_is_refused(self, checkpoint: Path, file: str) -> None:
        (checkpoint / "modeling_evil.py").write_text(EVIL)
        change(checkpoint / file, auto_map={"AutoModel": "modeling_evil.Evil", "AutoTokenizer": ["modeling_evil.Evil"]})

        with pytest.raises(ModelRefused, match="auto_map"):
            serve(checkpoint)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
    def test_pickled_weights_alone_are_refused_by_name(self, checkpoint: Path, name: str) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")

        with pytest.raises(ModelRefused, match=name):
            serve(checkpoint)

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "__init__.py", "modeling_evil.py", "tokenization_evil.py", "conftest.py"]
    )
    def test_beside_good_weights_they_lie_unread(self, checkpoint: Path, name: str) -> None:
        (checkpoint / name).write_text(EVIL)

        serve(checkpoint)

    def test_a_module_of_its_own_is_refused_by_name(self, checkpoint: Path) -> None:
        (checkpoint / "evil.py").write_text(EVIL)
        modules = json.loads((checkpoint / "modules.json").read_text())
        modules[1]["type"] = "evil.Pooling"
        (checkpoint / "modules.json").write_text(json.dumps(modules))

        with pytest.raises(ModelRefused, match=r"evil\.Pooling"):
            serve(checkpoint)


class TestConfinement:
    @pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_a_link_out_is_refused_by_name(self, checkpoint: Path, file: str, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        (checkpoint / file).rename(outside)
        (checkpoint / file).symlink_to(outside)

        with pytest.raises(ModelRefused, match=file):
            serve(checkpoint)

    @pytest.mark.parametrize("path", ["../outside", "/etc", "1_Pooling/../../outside", "..\\outside"])
    def test_a_path_out_is_refused_by_name(self, checkpoint: Path, path: str) -> None:
        modules = json.loads((checkpoint / "modules.json").read_text())
        modules[1]["path"] = path
        (checkpoint / "modules.json").write_text(json.dumps(modules))

        with pytest.raises(ModelRefused, match="outside"):
            serve(checkpoint)

    def test_a_directory_linked_out_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.move(checkpoint / "1_Pooling", tmp_path / "pooling")
        (checkpoint / "1_Pooling").symlink_to(tmp_path / "pooling")

        with pytest.raises(ModelRefused, match="outside the checkpoint"):
            serve(checkpoint)


class TestDigest:
    def test_one_byte_of_the_weights_shows_in_the_identity(self, checkpoint: Path) -> None:
        """And in the revision, where nothing else gives one. A caller pins it with ``expected_revision``."""
        before = load_checkpoint(str(checkpoint))
        file = checkpoint / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        after = load_checkpoint(str(checkpoint))

        assert after.weights_digest != before.weights_digest
        assert after.revision != before.revision
        assert after.tokenizer_digest == before.tokenizer_digest


class TestLies:
    """Values that were found by mutation, each of which once ended in an exception of Python's."""

    @pytest.mark.parametrize(
        ("file", "values"),
        [
            ("config.json", {"hidden_act": None}),
            ("config.json", {"num_attention_heads": 0}),
            ("config.json", {"num_attention_heads": 3}),
            ("config.json", {"dtype": "/"}),
            ("config.json", {"architectures": 3}),
            ("config.json", {"pad_token_id": 2**31}),
            ("config.json", {"intermediate_size": 2**40}),
            ("config.json", {"type_vocab_size": []}),
            ("config_sentence_transformers.json", {"default_prompt_name": []}),
            ("config_sentence_transformers.json", {"prompts": {"query": "\ud800"}}),
            ("tokenizer.json", {"post_processor": TEMPLATE_OF_NOTHING}),
            ("1_Pooling/config.json", {"pooling_mode": [["mean"]]}),
            ("sentence_bert_config.json", {"tokenizer_args": "x", "max_seq_length": None}),
            ("sentence_bert_config.json", {"max_seq_length": float("nan")}),
            ("sentence_bert_config.json", {"max_seq_length": -float("inf")}),
        ],
        ids=str,
    )
    def test_are_refused_with_a_sentence(self, checkpoint: Path, file: str, values: dict[str, Any]) -> None:
        change(checkpoint / file, **values)

        with pytest.raises(ModelRefused, match="checkpoint"):
            serve(checkpoint)

    @pytest.mark.parametrize("layers", [2**31 - 1, 10**30, 1025])
    def test_layers_without_end_are_refused_before_the_first_is_built(self, checkpoint: Path, layers: int) -> None:
        change(checkpoint / "config.json", num_hidden_layers=layers)
        begun = time.monotonic()

        with pytest.raises(ModelRefused, match="num_hidden_layers"):
            serve(checkpoint)

        assert time.monotonic() - begun < 1


@pytest.mark.process
def test_mutations_are_refused_or_served(good: Path) -> None:
    """In bounded time and memory, with no exception but ``StartupError``."""
    more = ["0", "0", FUZZ_S] if FUZZ_S else ["0", str(SEEDS)]
    more[0] = str(time.time_ns() % 2**31) if FUZZ_S else "0"
    limit_s = 90 + float(FUZZ_S or 0)
    command = [sys.executable, "-m", "tests.security.fuzz_checkpoint", str(good), *more]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=limit_s, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]
    *broken, totals = map(json.loads, done.stdout.splitlines())
    assert broken == []
    assert totals["totals"]["refused"] > 0
    assert totals["totals"]["served"] > 0
    assert totals["growth_mib"] < GROWTH_MIB_MAX


def test_every_way_of_being_wrong_is_a_start_that_fails(tmp_path: Path) -> None:
    """An empty directory, one with directories for files, one that cannot be read."""
    ways: list[Callable[[Path], object]] = [
        lambda place: place,
        lambda place: (place / "config.json").mkdir(),
        lambda place: (place / "config.json").symlink_to(place / "config.json"),
        lambda place: os.mkfifo(place / "config.json"),
    ]
    for number, way in enumerate(ways):
        place = tmp_path / str(number)
        place.mkdir()
        way(place)
        with pytest.raises(StartupError):
            load_checkpoint(str(place))
