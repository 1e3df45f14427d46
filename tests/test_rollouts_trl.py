"""The loss of GRPO, its gradient and its advantages, against TRL's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import model, rollouts
from gptjax.data.batches import Batch
from gptjax.interop import hf, pretrained
from gptjax.objectives import OBJECTIVE
from tests.test_rollouts import configure, drawn, store

trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

__all__ = ["store"]  # a fixture


def trainer(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    return trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=lambda **_: [0.0],
        args=trl.GRPOConfig(
            output_dir=str(folder / "trl"), loss_type="bnpo", beta=0.0, epsilon=0.2, use_cpu=True,
            report_to="none", per_device_train_batch_size=8, num_generations=4, bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=tokenizer,
    )  # fmt: skip


def theirs(folder: Path, batch: Batch[Any]) -> tuple[float, Any]:
    """TRL's loss of the answers, and its gradient as our tree."""
    other = trainer(folder)
    other.model.eval()
    tokens = torch.tensor(np.concatenate([batch.tokens, batch.targets[:, -1:]], 1)).long()
    worth = np.abs(batch.advantages).max(1) * np.sign(batch.advantages.sum(1))
    # One token of a prompt; what is not scored behind it is masked out.
    inputs = {
        "prompt_ids": tokens[:, :1], "prompt_mask": torch.ones(8, 1).long(),
        "completion_ids": tokens[:, 1:], "completion_mask": torch.ones(8, tokens.shape[1] - 1).long(),
        "tool_mask": torch.tensor(batch.weights), "advantages": torch.tensor(worth),
        "old_per_token_logps": torch.tensor(batch.sampled),
    }  # fmt: skip
    loss = other._compute_loss(other.model, inputs)
    loss.backward()
    gradients = transformers.AutoModelForCausalLM.from_pretrained(folder)
    slopes = dict(other.model.named_parameters())
    for path, parameter in gradients.named_parameters():
        parameter.data = slopes[path].grad
    gradients.save_pretrained(folder / "gradients")
    for file in folder.glob("token*"):
        (folder / "gradients" / file.name).write_bytes(file.read_bytes())
    return float(loss.detach()), pretrained.load(pretrained.find(folder / "gradients")).params


@pytest.mark.parametrize("off", [0.0, 0.3])
def test_loss_and_gradient_are_those_of_trl(off: float, store: Path, tmp_path: Path) -> None:
    """A small Llama; where answers were drawn by another model the clip holds back half of them."""
    config = configure(
        store, model__position="rope", model__feedforward="swiglu", model__norm="rmsnorm",
        model__bias=False, model__tied=False, model__layers=2, model__width=32,
        model__norm_eps=1e-6,
    )  # fmt: skip
    params = model.init(config.model, 1)
    batch = drawn(config, params, off=off)
    hf.export(tmp_path / "model", config.model, params, "bytes")
    wanted, slopes = theirs(tmp_path / "model", batch)

    def loss(params: Any) -> jax.Array:
        totals = OBJECTIVE["grpo"].totals(config, params, batch, None)
        return totals.objective / totals.weight

    got, gradient = jax.value_and_grad(loss)(params)
    assert float(got) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    furthest = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), gradient, slopes)
    assert scale > 1e-3 and max(jax.tree.leaves(furthest)) < 1e-5 * scale


def test_advantages_are_those_of_trl() -> None:
    """The lines of its `_generate_and_score_completions`, for scale_rewards="group"."""
    rewards = torch.tensor(np.random.default_rng(0).normal(size=24))
    groups = rewards.view(-1, 6)
    mean, std = (x.repeat_interleave(6) for x in (groups.mean(1), groups.std(1)))
    wanted = (rewards - mean) / (std + 1e-4)
    np.testing.assert_allclose(rollouts.advantages(rewards.numpy(), 6), wanted, rtol=1e-12)
