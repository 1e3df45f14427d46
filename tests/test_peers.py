"""`experiments/peers`: who takes which turn, what the table says, and that the sides are alike.

Nothing is timed: the measurements themselves are stood in for.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import model
from gptjax.config import UserError
from gptjax.interop import hf
from gptjax.perplexity import batch_nll
from tests import tiny

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "peers"))
import measure
import run
import served


def test_sides_take_turns() -> None:
    turns = [(t.round, t.cache, t.side) for t in run.order("AB", 2, ("cold", "warm"))]
    assert turns == [
        (0, "cold", "A"), (0, "cold", "B"), (0, "warm", "A"), (0, "warm", "B"),
        (1, "cold", "A"), (1, "cold", "B"), (1, "warm", "A"), (1, "warm", "B"),
    ]  # fmt: skip


# (task, side) -> what the rounds give; a list holds the turns within a process.
RESULTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("limits", "jax"): [{"float32 product, GFLOP/s": [90, 100, 110], "memory read, GB/s": 20}] * 3,
    ("limits", "PyTorch"): [{"float32 product, GFLOP/s": 200, "memory read, GB/s": 10}] * 3,
    ("prepare", "gptjax"): [{"flops_per_token": 5e6, "parameters": 1.25e8}],
    ("train", "gptjax"): [
        {"tokens/s": speed, "first step, s": 6.0, "loss, first step": 4.125}
        for speed in (1000, 1100, 1500, 1200, 900, 1000)
    ],
    ("train", "nanoGPT"): [{"absent": "no checkout: --nanogpt=PATH"}],
    ("train", "plain PyTorch"): [{"failed": "RuntimeError: no compiler", "stderr": "..."}],
    ("decode", "gptjax"): [
        {"tokens/s, batch 1": 10.0 * n, "tokens/s, batch 8": 80} for n in (1, 2, 3)
    ],
    ("decode", "gptjax int8"): [{"tokens/s, batch 1": 40, "tokens/s, batch 8": 160}] * 3,
    ("decode", "transformers"): [{"tokens/s, batch 1": 5, "tokens/s, batch 8": 40}] * 3,
    ("decode", "gptjax blocks"): [{"absent": "reads .gguf files"}],
    ("decode", "llama.cpp"): [{"absent": "xllamacpp is not installed"}],
}


def test_the_results_are_those_of_the_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = {key: list(results) for key, results in RESULTS.items()}
    programs: list[tuple[str, Path]] = []

    def stand_in(job: dict[str, Any], cache: Path) -> dict[str, Any]:
        programs.append((job["side"], cache))
        return left[job["task"], job["side"]].pop(0)

    monkeypatch.setattr(run, "measure", stand_in)
    assert run.main([f"--out={tmp_path}", "--tasks=train,decode,limits"]) == 1  # one has failed
    assert not any(left.values())
    record = json.loads((tmp_path / "results.json").read_text())
    trained = [(r["round"], r["cache"]) for r in record["runs"] if r["side"] == "gptjax"][1:7]
    assert trained == [(n, cache) for n in range(3) for cache in ("cold", "warm")]
    ours = [cache for side, cache in programs if side == "gptjax"][1:7]
    assert ours[0::2] == ours[1::2]
    assert len(set(ours)) == 3, "each round begins cold"
    assert " " not in "".join(str(cache) for _, cache in programs)
    table = (tmp_path / "results.md").read_text()
    assert record["machine"]["processor"] in table
    for line in (
        "| machine | limits: float32 product, GFLOP/s | jax | 100.0 | 100.0 to 100.0 |  |",
        "| a | train: tokens/s | gptjax | 1,050 | 900.0 to 1,500 |  |",
        "| a | train: first step, s, cold | gptjax | 6.000 | 6.000 to 6.000 |  |",
        "| a | train: loss, first step | gptjax | 4.12500 | 4.12500 to 4.12500 |  |",
        # 1,050 tokens/s of 5 MFLOP, of 200 GFLOP/s.
        "| a | train: MFU, % | gptjax | 2.625 | 2.250 to 3.750 |  |",
        "| a | decode: tokens/s, batch 1 | transformers | 5.000 | 5.000 to 5.000 | 4.00 (2.00 to 6.00) |",
        "| a | decode: tokens/s, batch 8 | gptjax int8 | 160.0 | 160.0 to 160.0 | 0.50 (0.50 to 0.50) |",
        # 20 GB/s of 0.5 GB, for each of 8 texts.
        "| a | decode: tokens/s, batch 8 | bound, float32 | 320.0 | 320.0 to 320.0 | 0.25 (0.25 to 0.25) |",
        "absent: a, decode, llama.cpp: xllamacpp is not installed",
        "failed: a, train, plain PyTorch: RuntimeError: no compiler",
    ):
        assert line in table.splitlines(), line
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert run.main([f"--out={tmp_path}"]) == 2
    assert (
        capsys.readouterr().err
        == f"peers: {tmp_path} holds results: name another folder with --out\n"
    )


@pytest.mark.parametrize(
    "word, said",
    [
        ("--shapes=a,z", "'z' is not one of: a, b, c"),
        ("--tasks=trian", "'trian' is not one of: limits, train, decode, score, tokenise"),
        ("--nanogpt=nowhere", "holds no model.py"),
        ("--model=nowhere", "nowhere is not there"),
        ("--rounds=0", "--rounds must be at least 1"),
    ],
)
def test_mistakes_are_told_in_a_line(
    word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([f"--out={tmp_path / 'out'}", word]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_small_vocabularies_keep_the_commonest_characters() -> None:
    assert measure.encode("aabacbad", 3).tolist() == [0, 0, 1, 0, 2, 1, 0, 2]


def test_plain_pytorch_computes_our_loss(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from plain import GPT, load_gpt2
    from safetensors.torch import load_file

    # Large initial values, so that no term of the function is lost in rounding.
    knobs = {"vocab_size": 65, "context": 16, "width": 16, "heads": 2, "layers": 2, "ff_dim": None}
    ours, biased = (tiny.model(**knobs, init_scale=20.0, bias=bias) for bias in (False, True))
    hf.export(tmp_path / "model", biased, model.init(biased, 0), None)
    plain = GPT(65, 16, 2, 16, 2)
    load_gpt2(plain, load_file(tmp_path / "model" / "model.safetensors"))
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(65, size=400))
    shape = {"rows": 3, "context": 16}
    tokens, targets = next(measure.batches({"folder": tmp_path, "shape": shape}))
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    with jax.set_mesh(tiny.mesh()):
        batch = measure.gptjax_batch(tokens, targets, "BT")
        nll_BT = batch_nll(ours, None, model.init(ours, 0), batch)
    with torch.no_grad():
        logits_BTV, loss = plain(torch.from_numpy(tokens), torch.from_numpy(targets))
    wanted = torch.from_numpy(targets)[..., None]
    plain_BT = -logits_BTV.log_softmax(-1).gather(-1, wanted)[..., 0].numpy()
    # Losses of up to some 16 nats, each the end of some 50 products and sums in float32.
    np.testing.assert_allclose(plain_BT, nll_BT, rtol=0, atol=16 * 50 * 2**-24)
    assert float(loss) == pytest.approx(float(plain_BT.mean()), rel=48 * 2**-24)


def test_clients_of_a_server_count_its_tokens_and_its_table_has_them() -> None:
    pytest.importorskip("gptjax.serve.app")
    from tests.test_serve_api import serving, texts

    questions = iter([f"What does cat {i} see?" for i in range(5)])
    with serving(texts()) as running:
        before = running.engine.counts.text_tokens
        seen = asyncio.run(served.load(running.url, questions, clients=2, each=2, tokens=6))
        drawn = running.engine.counts.text_tokens - before
    assert drawn - 4 <= seen["tokens"] <= drawn and next(questions, None) is None
    assert 0 < seen["first token, s"] <= seen["first token of nine in ten, s"]
    turns = [
        {"side": "gptjax", "round": i, "load": 0.5, "clients": n, **seen, "tokens/s": 10.0 * (i + n)}
        for i in (0, 1, 2) for n in (1, 8)
    ]  # fmt: skip
    gone = {"side": "llama.cpp", "round": 0, "load": 0.5, "clients": 0, "failed": "no xllamacpp"}
    record = {"machine": run.describe_machine(), "rounds": 3, "tokens": 6, "runs": [*turns, gone]}
    table = served.table(record)
    assert "| 1 | gptjax | 20.00 (10.00 to 30.00) |" in table
    assert "| 8 | gptjax | 90.00 (80.00 to 100.00) |" in table
    assert "failed: llama.cpp: no xllamacpp" in table


def test_a_server_that_does_not_start_says_why() -> None:
    pytest.importorskip("httpx")
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(UserError, match="no such model"), served.server(command, 1):
        pass
