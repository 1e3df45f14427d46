"""The losses of preferences, and their gradients, against TRL's own trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import model, preferences
from gptjax.config import Config
from gptjax.data.batches import Pairs
from gptjax.data.store import Store
from gptjax.interop import hf, pretrained
from gptjax.objectives import OBJECTIVE
from tests import tiny
from tests.test_preferences import BYTES, PAIRS, PREFERENCES, configure, write

trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
cpo = pytest.importorskip("trl.experimental.cpo")

FEW = PAIRS[:8]


def trainer(name: str, config: Config, folder: Path, reference: Path) -> Any:
    """TRL's for an objective, on `FEW` in their order."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    knobs: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "beta": config.train.beta, "report_to": "none",
        "per_device_train_batch_size": len(FEW), "use_cpu": True, "max_length": 64,
        "gradient_checkpointing": False, "bf16": False,
    }  # fmt: skip
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in FEW]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # What ends a document here ends an answer there.
    tokenizer.bos_token, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.pad_token = tokenizer.eos_token
    common = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    if name == "simpo":
        more = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": config.train.gamma}
        return cpo.CPOTrainer(load(folder), args=cpo.CPOConfig(**knobs, **more), **common)
    more = {"loss_type": {"dpo": "sigmoid", "ipo": "ipo"}[name]}
    return trl.DPOTrainer(
        load(folder), load(reference), args=trl.DPOConfig(**knobs, **more), **common
    )


def theirs(name: str, config: Config, folder: Path, reference: Path) -> tuple[float, Any]:
    """TRL's loss, and its gradient as our tree."""
    other = trainer(name, config, folder, reference)
    rows = [other.train_dataset[i] for i in range(len(FEW))]
    batch = other.data_collator(rows)
    other.model.eval()
    if name == "simpo":
        loss, _ = other.get_batch_loss_metrics(other.model, batch)
    else:
        loss = other.compute_loss(other.model, batch)
    loss.backward()
    gradients = transformers.AutoModelForCausalLM.from_pretrained(folder)
    slopes = dict(other.model.named_parameters())
    for path, parameter in gradients.named_parameters():
        parameter.data = slopes[path].grad
    gradients.save_pretrained(folder / "gradients")
    for file in folder.glob("token*"):
        (folder / "gradients" / file.name).write_bytes(file.read_bytes())
    return float(loss.detach()), pretrained.load(pretrained.find(folder / "gradients")).params


@pytest.mark.parametrize("name", PREFERENCES)
def test_loss_and_gradient_are_those_of_trl(name: str, tmp_path: Path) -> None:
    """A small Llama, some steps away from its reference, from the texts on."""
    write(tmp_path / "store" / "train", FEW)
    write(tmp_path / "store" / "val", FEW[:1])
    config = configure(
        tmp_path / "store", name, model__position="rope", model__feedforward="swiglu",
        model__norm="rmsnorm", model__bias=False, model__tied=False, model__layers=2,
        model__width=32, train__beta=0.5, model__norm_eps=1e-6,
    )  # fmt: skip
    start = model.init(config.model, 0)
    params = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, start, model.init(config.model, 1))
    for folder, tree in (("reference", start), ("policy", params)):
        hf.export(tmp_path / folder, config.model, tree, "bytes")
    wanted, slopes = theirs(name, config, tmp_path / "policy", tmp_path / "reference")
    rows = Pairs(Store.open(tmp_path / "store" / "train", BYTES), config.model.context, BYTES.eot)
    batch = rows.rows(np.arange(len(FEW)))
    with jax.set_mesh(tiny.mesh()):
        nll_BT = np.asarray(preferences.batch_nll(config.model, None, start, batch))
    batch = batch._replace(reference=np.where(batch.segments >= 0, nll_BT, 0))

    def loss(params: Any) -> jax.Array:
        totals = OBJECTIVE[name].totals(config, params, batch, None)
        return totals.objective / totals.weight

    got, gradient = jax.value_and_grad(loss)(params)
    assert float(got) == pytest.approx(wanted, rel=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    furthest = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), gradient, slopes)
    assert scale > 1e-3 and max(jax.tree.leaves(furthest)) < 1e-5 * scale
