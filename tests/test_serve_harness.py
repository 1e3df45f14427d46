"""lm-evaluation-harness asks the served model what it asks our own adapter, and is told the same."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import yaml

from gptjax import decode, trained
from gptjax.serve import api
from gptjax.serve.engine import Engine
from gptjax.setup import load_tokenizer
from tests.test_evaluation_harness import (  # noqa: F401 (a fixture)
    CONTEXT,
    NATS,
    TASKS,
    Made,
    TaskManager,
    Told,
    harness,
    lm_eval,
    made,
    only_one,
)

pytest.importorskip("tenacity")  # of the harness's clients of APIs
pytest.importorskip("gptjax.serve.app")
Client = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
pytestmark = [only_one, pytest.mark.slow]

NAMES = [f"local_{name}" for name in TASKS]
# The client leaves a token of the context free, and so cuts long texts elsewhere: none is so long.
LONGEST = CONTEXT - 20 - 2


@pytest.fixture(scope="module")
def told(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Told:  # noqa: F811
    """All tasks, by our adapter in this process and by the harness's client of the server."""
    from tests.test_serve_api import serving

    out, tokenizer = tmp_path_factory.mktemp("tasks"), load_tokenizer(made.model.config)
    for name, (rows, settings) in TASKS.items():
        fit = [r for r in rows if len(tokenizer.encode(str(r.get("page", r.get("query", r.get("text")))))) <= LONGEST]  # fmt: skip
        assert fit
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fit))
        data = {"data_files": {"test": str(out / f"{name}.jsonl")}, "cache_dir": str(out / "cache")}
        about = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": data}
        text = yaml.safe_dump({**about, "test_split": "test", **settings})
        (out / f"{name}.yaml").write_text(text)
    # Reading the harness's own 14,000 tasks takes seven seconds.
    only_ours = functools.partial(TaskManager, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch, trained.opened(made.model) as opened:
        patch.setattr(harness, "TaskManager", only_ours)
        ours = harness.evaluate(opened, NAMES, harness.manager_of(NAMES, out))
        config = opened.config.model
        weights = decode.cast(config, opened.params)
    texts = Engine(config, weights, vocab_size=tokenizer.vocab_size, slots=4)
    texts.start()
    with serving(texts, api.Served("small", tokenizer, config.context, 0)) as running:
        client = Client(
            base_url=f"{running.url}/v1/completions", model="small", batch_size=4, max_retries=1,
            tokenizer_backend="huggingface", tokenizer=str(made.model.folder), max_length=CONTEXT,
        )  # fmt: skip
        theirs = lm_eval.simple_evaluate(
            client, tasks=NAMES, task_manager=only_ours(include_path=out)
        )
    texts.close()
    return Told(ours, theirs)


@pytest.mark.parametrize("name", TASKS)
def test_figures_are_the_same(told: Told, name: str) -> None:
    ours, theirs = told.results(name)
    # Standard errors are bootstrapped, each side's with draws of its own.
    figures = [k for k, v in ours.items() if isinstance(v, float) and "stderr" not in k]
    assert figures
    for key in figures:
        assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-6), key


def test_likelihoods_are_the_same_document_by_document(told: Told) -> None:
    for name in ("words", "choices"):
        ours, theirs = (
            np.array([[float(r[0][0]) for r in resps] for resps in side])
            for side in told.answers(name)
        )
        assert np.ptp(ours) > 5
        np.testing.assert_allclose(ours, theirs, **NATS)
    ours, theirs = told.answers("words")
    assert [str(r[0][0][1]) for r in ours] == [str(r[0][0][1]) for r in theirs]


def test_texts_are_the_same(told: Told) -> None:
    ours, theirs = told.answers("answers")
    assert ours == theirs and len(ours) > 3
