"""What is read from a checkpoint's metadata, and each refusal with its sentence."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedserve.errors import ModelRefused, StartupError
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.pipeline import DenseSpec
from embedserve.model.tokenizer import Truncation
from tests.unit.model.metadata import CONFIG, MODULES, VOCAB, safetensors, tokenizer_json, write_checkpoint

END = Truncation.END


def load(folder: Path, max_input_length: int | None = None, **files: Any) -> Checkpoint:
    return load_checkpoint(str(write_checkpoint(folder, **files)), max_input_length=max_input_length)


def dense_files(activation: str = "torch.nn.modules.activation.Tanh", **changes: Any) -> dict[str, Any]:
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    config = {"in_features": 8, "out_features": 4, "bias": True, "activation_function": activation}
    return {
        "modules.json": [*MODULES[:2], dense],
        "2_Dense/config.json": config | changes,
        "2_Dense/model.safetensors": safetensors(),
    }


class TestIdentity:
    def test_says_all_that_was_read(self, tmp_path: Path) -> None:
        checkpoint = load(tmp_path / "tiny")

        identity = checkpoint.identity_for("cpu", "float32")

        assert identity.name == "tiny"
        assert identity.revision == identity.weights_digest.removeprefix("sha256:")[:12]
        assert (identity.architecture, identity.dimension, identity.vocab_size) == ("bert", 8, 11)
        assert (identity.pooling, identity.normalize) == ("mean", True)
        assert (identity.device, identity.dtype) == ("cpu", "float32")

    def test_tokenizer_digest_is_that_of_the_file(self, tmp_path: Path) -> None:
        """Where no other file changes the tokenizer, ``sha256sum tokenizer.json`` gives the same digits."""
        output = subprocess.check_output(["sha256sum", write_checkpoint(tmp_path) / "tokenizer.json"], text=True)

        assert load_checkpoint(str(tmp_path)).tokenizer_digest == "sha256:" + output.split()[0]

    def test_dense_weights_are_in_the_digest(self, tmp_path: Path) -> None:
        plain = load(tmp_path / "a", **dense_files())
        other = load(tmp_path / "b", **dense_files() | {"2_Dense/model.safetensors": safetensors(other=(3,))})

        assert plain.weights_digest != other.weights_digest
        assert plain.dimension == 4

    def test_reading_needs_no_torch(self, tmp_path: Path) -> None:
        """``check-config`` reads a checkpoint; importing torch would take seconds."""
        code = (
            "import sys; from embedserve.model.checkpoint import load_checkpoint; "
            "load_checkpoint(sys.argv[1]).tokenizer(); "
            "print(sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
        )
        service = Path(__file__).parents[3] / "service"
        folder = write_checkpoint(tmp_path)

        output = subprocess.check_output([sys.executable, "-c", code, folder], cwd=service, text=True)

        assert output.strip() == "[]"


class TestInputLength:
    @pytest.mark.parametrize(
        ("sentence", "tokenizer", "expected"),
        [
            ({"max_seq_length": 20}, {"model_max_length": 10}, 20),
            ({}, {"model_max_length": 10}, 10),
            ({}, {"model_max_length": 10**30}, 64),
            ({}, {}, 64),
            ({"max_seq_length": None}, {"model_max_length": 10}, 10),
            ({"max_seq_length": 500}, {}, 64),
            ({"tokenizer_args": {"model_max_length": 12}}, {"model_max_length": 10}, 12),
        ],
    )
    def test_is_what_sentence_transformers_takes_within_the_positions(
        self, tmp_path: Path, sentence: dict[str, Any], tokenizer: dict[str, Any], expected: int
    ) -> None:
        files = {"sentence_bert_config.json": sentence, "tokenizer_config.json": tokenizer}

        assert load(tmp_path, **files).max_input_length == expected

    def test_roberta_counts_positions_after_the_padding_index(self, tmp_path: Path) -> None:
        config = CONFIG | {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}

        assert load(tmp_path, **{"config.json": config}).max_input_length == 512

    def test_override_goes_up_to_the_positions(self, tmp_path: Path) -> None:
        files = {"sentence_bert_config.json": {"max_seq_length": 20}}

        assert load(tmp_path, 64, **files).max_input_length == 64
        with pytest.raises(StartupError, match="max_input_length is 65; this checkpoint takes 4 to 64 tokens"):
            load(tmp_path, 65, **files)

    def test_length_without_room_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelRefused, match="its maximum length is 2 tokens, which leaves no room for a text"):
            load(tmp_path, **{"sentence_bert_config.json": {"max_seq_length": 2}})


class TestPipeline:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({}, ("mean",)),
            ({"pooling_mode_cls_token": True}, ("cls",)),
            ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
            ({"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True}, ("max", "last_token")),
            ({"pooling_mode": "lasttoken"}, ("last_token",)),
            ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
            ({"pooling_mode": "weightedmean", "pooling_mode_cls_token": True}, ("weighted_mean",)),
            ({"pooling_mode": "mean_sqrt_len_tokens"}, ("mean_sqrt_len",)),
        ],
    )
    def test_pooling_is_read_in_both_spellings(
        self, tmp_path: Path, config: dict[str, Any], expected: tuple[str, ...]
    ) -> None:
        checkpoint = load(tmp_path, **{"1_Pooling/config.json": config})

        assert checkpoint.pipeline.pooling.modes == expected
        assert checkpoint.identity_for("cpu", "float32").pooling == "+".join(expected)
        assert checkpoint.dimension == 8 * len(expected)

    def test_include_prompt_is_read(self, tmp_path: Path) -> None:
        assert load(tmp_path).include_prompt
        assert not load(tmp_path, **{"1_Pooling/config.json": {"include_prompt": False}}).include_prompt

    def test_without_modules_json_mean_pooling_is_noted(self, tmp_path: Path) -> None:
        checkpoint = load(tmp_path, **{"modules.json": None})

        assert (checkpoint.pipeline.pooling.modes, checkpoint.pipeline.normalize) == (("mean",), False)
        assert checkpoint.notes == (
            "the checkpoint has no modules.json: mean pooling without normalisation, as sentence-transformers",
        )

    def test_dense_is_read(self, tmp_path: Path) -> None:
        checkpoint = load(tmp_path, **dense_files("torch.nn.modules.linear.Identity", bias=False))

        assert checkpoint.pipeline.dense == (
            DenseSpec("2_Dense", 8, 4, bias=False, activation="Identity", residual=False),
        )

    def test_older_layout_with_a_folder_for_the_encoder(self, tmp_path: Path) -> None:
        modules = [MODULES[0] | {"path": "0_Transformer"}, *MODULES[1:]]
        moved = {
            f"0_Transformer/{name}": content
            for name, content in {
                "config.json": CONFIG,
                "tokenizer.json": tokenizer_json(),
                "model.safetensors": safetensors(),
            }.items()
        }
        removed = {"config.json": None, "tokenizer.json": None, "model.safetensors": None}

        checkpoint = load(tmp_path, **removed, **moved, **{"modules.json": modules})

        assert checkpoint.weight_files[0].parent.name == "0_Transformer"

    @pytest.mark.parametrize(
        ("modules", "sentence"),
        [
            ([*MODULES[:2], {"path": "x", "type": "sentence_transformers.models.LSTM"}], "lists the modules .*LSTM"),
            ([MODULES[1], MODULES[0]], "in this order"),
            (MODULES[:1], "lists the modules Transformer; served are"),
            (
                [MODULES[0], MODULES[1], MODULES[2], {"path": "d", "type": "sentence_transformers.models.Dense"}],
                "in this",
            ),
            ([{"path": "", "type": "custom_st.Transformer"}], "'custom_st.Transformer': code that comes with"),
            ([{"path": "../x", "type": "sentence_transformers.models.Transformer"}, MODULES[1]], "a path outside it"),
            ([{"idx": 0}], "has an entry without a type and a path"),
            ({}, "does not hold a list of modules"),
        ],
    )
    def test_other_modules_are_refused(self, tmp_path: Path, modules: Any, sentence: str) -> None:
        with pytest.raises(ModelRefused, match=sentence):
            load(tmp_path, **{"modules.json": modules})

    @pytest.mark.parametrize(
        ("files", "sentence"),
        [
            ({"1_Pooling/config.json": None}, "1_Pooling/config.json is missing: how this model pools is not known"),
            ({"1_Pooling/config.json": {"pooling_mode": "attention"}}, "pooling_mode 'attention' is not known"),
            ({"1_Pooling/config.json": {"pooling_mode": []}}, r"pooling_mode \[\] is not known"),
            ({"2_Normalize/config.json": {"module_input_name": "token_embeddings"}}, "'token_embeddings'; only"),
            (dense_files("os.system"), "activation_function 'os.system' is not served"),
            (dense_files("torch.nn.modules.activation.PReLU"), "PReLU' is not served; known are Identity"),
            (dense_files(in_features=9), "takes 9 floats, the module before it gives 8"),
            (dense_files(out_features=10**9), "out_features is 1000000000, which is not a width"),
            (dense_files() | {"2_Dense/config.json": None}, "2_Dense/config.json is missing"),
        ],
    )
    def test_module_settings_that_we_cannot_honour_are_refused(
        self, tmp_path: Path, files: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(ModelRefused, match=sentence):
            load(tmp_path, **files)


class TestEncoder:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"auto_map": {"AutoModel": "modeling.X"}}, "has auto_map: this checkpoint needs code of its own"),
            ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "llama is a decoder .LlamaForCausalLM."),
            ({"is_decoder": True}, "bert is a decoder .is_decoder.; encoders are served"),
            ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder model"),
            ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not served"),
            ({"quantization_config": {"bits": 4}}, "has quantization_config: quantised weights"),
            ({"model_type": None}, "has no model_type"),
            ({"vocab_size": 2**40}, "vocab_size 1099511627776, not a number from 1 to"),
            ({"hidden_size": -1}, "hidden_size -1, not a number"),
            ({"hidden_size": True}, "hidden_size True, not a number"),
            ({"hidden_size": None}, "does not say hidden_size"),
            ({"max_position_embeddings": 10**9}, "max_position_embeddings 1000000000"),
        ],
    )
    def test_what_is_no_plain_encoder_is_refused(self, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ModelRefused, match=sentence):
            load(tmp_path, **{"config.json": CONFIG | changes})

    def test_bidirectional_decoder_weights_are_not_refused_for_their_name(self, tmp_path: Path) -> None:
        config = CONFIG | {"architectures": ["GemmaForCausalLM"], "use_bidirectional_attention": True}

        assert load(tmp_path, **{"config.json": config}).architecture == "bert"

    def test_directory_that_is_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(ModelRefused, match=r"config.json does not exist: this is not a transformers checkpoint"):
            load(tmp_path, **{"config.json": None})

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"transformer_task": "fill-mask"}, "transformer_task 'fill-mask' makes no text vectors"),
            ({"modality_config": {"image": {}}}, "is not text through the last layer"),
            ({"query_length": 32}, "query_length is set to 32, which is not served"),
            ({"config_args": {"x": 1}}, "config_args is set to"),
        ],
    )
    def test_sentence_settings_that_we_do_not_honour_are_refused(
        self, tmp_path: Path, settings: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(ModelRefused, match=sentence):
            load(tmp_path, **{"sentence_bert_config.json": settings})


class TestPrompts:
    def test_are_kept_in_order(self, tmp_path: Path) -> None:
        config = {"prompts": {"query": "query: ", "document": None}, "default_prompt_name": "query"}

        checkpoint = load(tmp_path, **{"config_sentence_transformers.json": config})

        assert checkpoint.prompts == (("query", "query: "), ("document", ""))
        assert checkpoint.default_prompt_name == "query"

    @pytest.mark.parametrize(
        ("config", "sentence"),
        [
            ({"prompts": {"a": "b"}, "default_prompt_name": "c"}, "default_prompt_name 'c' is not among the prompts"),
            ({"prompts": ["a"]}, "prompts is not an object of texts"),
            ({"model_type": "SparseEncoder"}, "'SparseEncoder' is not a model that gives one vector a text"),
        ],
    )
    def test_wrong_prompts_are_refused(self, tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ModelRefused, match=sentence):
            load(tmp_path, **{"config_sentence_transformers.json": config})


class TestTokenizer:
    def test_bert_options_have_the_last_word(self, tmp_path: Path) -> None:
        """transformers lets ``tokenizer_config.json`` decide over the file, and a BERT class lowercases by default."""
        config = {"tokenizer_class": "BertTokenizer"}
        checkpoint = load(tmp_path, **{"tokenizer_config.json": config})

        assert checkpoint.tokenizer().count(["HELLO"]).tolist() == [3]
        assert '"lowercase": true' in checkpoint.tokenizer_json

    def test_do_lower_case_of_sentence_transformers_is_honoured(self, tmp_path: Path) -> None:
        checkpoint = load(tmp_path, **{"sentence_bert_config.json": {"do_lower_case": True}})

        assert checkpoint.tokenizer().token_id("hello") in checkpoint.tokenizer().encode(["HELLO"], truncation=END).ids

    def test_without_either_the_file_decides(self, tmp_path: Path) -> None:
        tokenizer = load(tmp_path).tokenizer()

        assert tokenizer.token_id("hello") not in tokenizer.encode(["HELLO"], truncation=END).ids

    @pytest.mark.parametrize(
        ("files", "sentence"),
        [
            ({"tokenizer.json": None}, "has no tokenizer: neither tokenizer.json nor any of vocab.txt"),
            ({"tokenizer.json": "{"}, "tokenizer.json' is not JSON|tokenizer.json is not JSON"),
            ({"tokenizer.json": "[]"}, "tokenizer.json is not a JSON object"),
            ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x"]}}}, "has auto_map, code that is never run"),
        ],
    )
    def test_without_a_usable_tokenizer_is_refused(self, tmp_path: Path, files: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ModelRefused, match=sentence):
            load(tmp_path, **files)

    def test_file_that_is_no_tokenizer_is_refused_when_it_is_built(self, tmp_path: Path) -> None:
        checkpoint = load(tmp_path, **{"tokenizer.json": "{}"})

        with pytest.raises(ModelRefused, match=r"tokenizer.json cannot be read"):
            checkpoint.tokenizer()

    def test_vocabulary_file_is_converted(self, tmp_path: Path) -> None:
        """Old checkpoints have ``vocab.txt`` only; transformers makes a fast tokenizer of it."""
        whole = load(tmp_path / "whole", **{"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}})
        vocabulary = "\n".join(VOCAB)
        files = {
            "tokenizer.json": None,
            "vocab.txt": vocabulary,
            "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"},
        }

        checkpoint = load(tmp_path / "old", **files)

        texts = ["Hello worlds, a b c!", "[MASK] ü"]
        expected = whole.tokenizer().encode(texts, truncation=END).ids.tolist()
        assert checkpoint.tokenizer().encode(texts, truncation=END).ids.tolist() == expected

    def test_control_tokens_must_be_in_the_vocabulary(self, tmp_path: Path) -> None:
        checkpoint = load(tmp_path)

        assert checkpoint.token_ids(["[CLS]", "hello"]) == (2, 5)
        with pytest.raises(StartupError, match="has no token 'nope' in its vocabulary"):
            checkpoint.token_ids(["[CLS]", "nope"])
