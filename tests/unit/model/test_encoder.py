"""Every tensor of a checkpoint is accounted for: a loader that only warns serves random vectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedserve.errors import ModelRefused
from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.dense import Dense, load_dense
from embedserve.model.encoder import load_encoder
from embedserve.model.files import CheckpointFiles
from embedserve.model.pipeline import DenseSpec
from tests.unit.model.checkpoints import HIDDEN, save_encoder

Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "bert", "bert")


def change(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(edit({name: tensor.clone() for name, tensor in tensors.items()}), folder / "model.safetensors")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_encoder(load_checkpoint(str(folder)), dtype)


def output(model: Any) -> Tensor:
    with torch.inference_mode():
        hidden: Tensor = model(input_ids=torch.tensor([[2, 9, 10, 11, 3]])).last_hidden_state
    return hidden


class TestRefusals:
    def test_missing_tensors_are_named(self, folder: Path) -> None:
        change(
            folder, lambda tensors: {name: t for name, t in tensors.items() if "layer.1.attention.self.key" not in name}
        )

        with pytest.raises(
            ModelRefused, match=r"missing: encoder.layer.1.attention.self.key.weight, encoder.*key.bias$"
        ):
            load(folder)

    def test_unexpected_tensors_are_named(self, folder: Path) -> None:
        change(folder, lambda tensors: tensors | {"adapter.weight": torch.ones(2)})

        with pytest.raises(ModelRefused, match=r"not those of BertModel; unexpected: adapter.weight"):
            load(folder)

    def test_misshapen_tensors_are_named_with_both_shapes(self, folder: Path) -> None:
        name = "encoder.layer.0.output.dense.bias"
        change(folder, lambda tensors: tensors | {name: torch.ones(HIDDEN + 1)})

        with pytest.raises(ModelRefused, match=rf"misshapen: {name} is \(33,\) and must be \(32,\)"):
            load(folder)

    def test_long_lists_are_counted(self, folder: Path) -> None:
        change(folder, lambda tensors: {name: t for name, t in tensors.items() if "encoder" not in name})

        with pytest.raises(ModelRefused, match=r"missing: (encoder\S+, ){7}encoder\S+ and 24 more"):
            load(folder)

    def test_prefix_is_never_stripped_from_a_part(self, folder: Path) -> None:
        """Half the tensors under ``bert.`` and half bare are two models, or a broken one."""

        def half(tensors: Tensors) -> Tensors:
            return {("bert." + name if "layer.1" in name else name): tensor for name, tensor in tensors.items()}

        change(folder, half)

        with pytest.raises(ModelRefused, match=r"missing: embeddings.*unexpected: embeddings"):
            load(folder)

    def test_foreign_prefix_is_not_guessed(self, folder: Path) -> None:
        """A loader that strips ``encoder.`` from a bare BERT drops every layer of it."""
        change(folder, lambda tensors: {"model." + name: tensor for name, tensor in tensors.items()})

        with pytest.raises(ModelRefused, match=r"missing: .*unexpected: model\."):
            load(folder)

    @pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
    def test_file_that_is_no_safetensors_is_named(self, folder: Path, content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)

        with pytest.raises(ModelRefused, match=r"model.safetensors cannot be read"):
            load(folder)

    def test_truncated_file_is_refused(self, folder: Path) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])

        with pytest.raises(ModelRefused, match=r"model.safetensors cannot be read"):
            load(folder)

    def test_architecture_that_transformers_does_not_know(self, folder: Path) -> None:
        config = (folder / "config.json").read_text(encoding="utf-8")
        (folder / "config.json").write_text(config.replace('"model_type": "bert"', '"model_type": "bort"'))

        with pytest.raises(ModelRefused, match="transformers has no encoder for 'bort'"):
            load(folder)

    def test_converted_architecture_is_held_to_the_same(self, tmp_path: Path) -> None:
        """Nomic's files keep other names, which only transformers' own loader converts; its gaps are refused too."""
        nomic = save_encoder(tmp_path / "nomic", "nomic_bert")

        def broken(tensors: Tensors) -> Tensors:
            del tensors["encoder.layers.0.attn.Wqkv.weight"]
            return tensors | {"extra.weight": torch.ones(1)}

        change(nomic, broken)

        with pytest.raises(ModelRefused, match=r"missing: layers.0.self_attn.k_proj.weight.*unexpected: extra.weight"):
            load(nomic)

    def test_huge_configuration_is_refused_before_it_is_allocated(self, folder: Path) -> None:
        """A config that claims 64k x 4M embeddings, a terabyte, beside a small file is a few milliseconds of work."""
        config = (folder / "config.json").read_text(encoding="utf-8")
        config = config.replace('"vocab_size": 600', '"vocab_size": 4000000').replace(
            '"hidden_size": 32', '"hidden_size": 65536'
        )
        (folder / "config.json").write_text(config)

        with pytest.raises(ModelRefused, match=r"word_embeddings.weight is \(600, 32\) and must be \(4000000, 65536\)"):
            load(folder)

    def test_causal_attention_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = transformers.BertModel.__init__

        def causal(self: Any, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            self.encoder.layer[0].attention.self.is_causal = True

        monkeypatch.setattr(transformers.BertModel, "__init__", causal)

        with pytest.raises(ModelRefused, match="bert attends to earlier tokens only; encoders are served"):
            load(folder)


class TestTolerated:
    def test_tensors_that_no_encoder_reads_are_set_aside(self, folder: Path) -> None:
        expected = output(load(folder))
        extra = {
            "pooler.dense.weight": torch.ones(2),
            "embeddings.position_ids": torch.arange(3),
            "cls.predictions.bias": torch.ones(1),
        }

        change(folder, lambda tensors: tensors | extra)

        assert torch.equal(output(load(folder)), expected)

    def test_uniform_prefix_of_the_base_model_is_stripped(self, folder: Path) -> None:
        """Checkpoints saved with a masked-language head."""
        expected = output(load(folder))

        change(
            folder,
            lambda tensors: (
                {"bert." + name: t for name, t in tensors.items()} | {"cls.predictions.bias": torch.ones(1)}
            ),
        )

        assert torch.equal(output(load(folder)), expected)

    def test_names_from_tensorflow_days_are_read(self, folder: Path) -> None:
        expected = output(load(folder))

        def old(tensors: Tensors) -> Tensors:
            renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            for new, former in renamed.items():
                tensors = {name.replace(new, former): tensor for name, tensor in tensors.items()}
            return tensors

        change(folder, old)

        assert torch.equal(output(load(folder)), expected)


class TestLoaded:
    def test_has_transformers_own_output(self, folder: Path) -> None:
        """To the last bit, and twice the same: nothing is random."""
        reference = transformers.AutoModel.from_pretrained(folder).eval()

        assert torch.equal(output(load(folder)), output(reference))

    def test_bfloat16_casts_weights_and_leaves_rotary_frequencies(self, tmp_path: Path) -> None:
        """Rounded frequencies would be other positions."""
        model = load(save_encoder(tmp_path / "modern", "modernbert"), torch.bfloat16)

        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {tensor.dtype for name, tensor in model.named_buffers() if "inv_freq" in name} == {torch.float32}

    def test_needs_no_gradient_and_has_no_pooler(self, folder: Path) -> None:
        model = load(folder)

        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert model.pooler is None

    def test_file_may_change_afterwards(self, folder: Path) -> None:
        """The weights are copied: memory mapped from a file that is cut short ends the process."""
        model = load(folder)
        expected = output(model)

        (folder / "model.safetensors").write_bytes(b"")

        assert torch.equal(output(model), expected)


class TestDense:
    @pytest.mark.parametrize(
        "tensors",
        [
            {"linear.weight": torch.ones(3, 2)},
            {"linear.weight": torch.ones(3, 2), "linear.bias": torch.ones(3), "other": torch.ones(1)},
            {"linear.weight": torch.ones(2, 3), "linear.bias": torch.ones(3)},
        ],
    )
    def test_weights_must_be_exactly_its_own(self, tmp_path: Path, tensors: Tensors) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        spec = DenseSpec("", 2, 3, bias=True, activation="Tanh", residual=False)

        with pytest.raises(ModelRefused, match="does not hold this Dense layer"):
            load_dense(spec, CheckpointFiles(tmp_path, tmp_path))

    def test_residual_of_equal_width_adds_the_input(self) -> None:
        layer = Dense(DenseSpec("", 2, 2, bias=False, activation="Identity", residual=True))
        torch.nn.init.zeros_(layer.linear.weight)

        assert torch.equal(layer(torch.ones(1, 2)), torch.ones(1, 2))
