"""`experiments/blocks.py`: what is rounded, by how much, and what that costs, by `transformers` too."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model, tokenizer
from gptjax.interop import hf
from gptjax.layers.parameter import Spec
from gptjax.model import abstract_params
from tests import tiny

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from experiments import blocks  # noqa: E402

# Rows of 32 and 64; those of 48, which heads of 12 make, are in no blocks.
CONFIG = tiny.model(
    vocab_size=264, context=64, width=32, heads=4, head_dim=12, kv_heads=2, ff_dim=64,
    feedforward="swiglu", norm="rmsnorm", position="rope", bias=False, tied=True,
)  # fmt: skip
TEXT = "".join(f"{n} times {n} is {n * n}, " for n in range(4))  # 64 bytes


def spread(spec: Spec, values: jax.Array) -> jax.Array:
    """Values of which each output has a scale of its own, so that blocks across outputs would show."""
    rng, shape = np.random.default_rng(len(spec.dims)), np.array(spec.shape)
    shape[[spec.dims.index(dim) for dim in spec.fan_in]] = 1
    return values * jnp.exp(rng.normal(1, 0.7, shape)).astype(jnp.float32)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    params = jax.tree.map(spread, abstract_params(CONFIG), model.init(CONFIG, 0))
    hf.export(folder / "model", CONFIG, params, "bytes")
    (folder / "text.txt").write_text(TEXT)
    blocks.main(
        [
            f"--model={folder / 'model'}", f"--out={folder / 'out'}", "--set", f"t={folder / 'text.txt'}",
            "--config.eval.prefix=none",
        ]
    )  # fmt: skip
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """As Hugging Face has them: of matrices a row for each output."""
    return safetensors.load_file(folder / "model.safetensors")


def steps(weights: np.ndarray, codes: int) -> np.ndarray:
    """For each weight, its block's range, from 0 or from the least weight, in so many steps."""
    rows = weights.reshape(len(weights), -1, 32)
    size = np.abs(rows).max(-1) if codes in (8, 127) else np.ptp(rows, axis=-1)
    return np.repeat(size / codes, 32, axis=-1)


# 2^-11 of what a float16 factor multiplies is lost: of at most 127 steps, of 8, of 15 and of the
# least weight. The farthest weight of a block of Q4_0 has the code -8; its opposite would be 8, and 7 is the last.
@pytest.mark.parametrize(
    "kind, codes, most", [("Q8_0", 127, 0.5), ("Q4_1", 15, 0.5), ("Q4_0", 8, 1)]
)
def test_weights_move_by_half_a_step_of_their_block_at_most(
    measured: Path, kind: str, codes: int, most: float
) -> None:
    original, copy = tensors(measured / "model"), tensors(measured / "out" / kind)
    assert original.keys() == copy.keys()
    whole = {n for n in copy if "norm" in n or "o_proj" in n}
    for name in whole:
        np.testing.assert_array_equal(original[name], copy[name])
    for name in original.keys() - whole:
        of_it = (127, 0.5) if "embed_tokens" in name else (codes, most)
        step = steps(original[name], of_it[0])
        apart = np.abs(copy[name] - original[name])
        lost = 2**-11 * (of_it[0] * step + np.abs(original[name]).max())
        assert (apart <= of_it[1] * step + lost).all(), name
        assert apart.max() > 0.4 * step.min(), name


def loss(folder: Path) -> float:
    """Of each token but the first of the text and its end, nats; by PyTorch."""
    ids = torch.tensor([[*TEXT.encode(), tokenizer.load("bytes").eot]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():  # (their own loss is float32)
        return float(torch.nn.functional.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:]))


def test_the_cost_is_that_of_another_program(measured: Path) -> None:
    results = json.loads((measured / "out" / "results.json").read_text())
    assert list(results) == [*blocks.KINDS, *blocks.KNOBS]
    before = loss(measured / "model")
    for kind in blocks.KINDS:
        found, more = results[kind]["texts"]["t"]["loss"], loss(measured / "out" / kind) - before
        assert more > 0.01
        # Ours is float32: logits of up to 20 lose 1e-6, and what they are summed from a few more.
        assert found["a"] == pytest.approx(before, abs=1e-5)
        assert found["difference"] == pytest.approx(more, abs=1e-5)
    for knob in blocks.KNOBS:
        assert results[knob]["texts"]["t"]["loss"]["difference"] != 0
        assert results[knob]["b"]["model_sha256"] == results[knob]["a"]["model_sha256"]
