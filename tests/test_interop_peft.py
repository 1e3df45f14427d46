"""Adapters against `peft` itself, in value, in gradients and on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import model, trainable, trained
from gptjax.cli import main
from gptjax.config import UserError
from gptjax.interop import peft as ours
from gptjax.interop import pretrained
from gptjax.layers.parameter import Adapted
from gptjax.records import read_environment, read_metrics
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

V, T = 264, 24
GPT2 = {"vocab_size": V, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": V, "max_position_embeddings": 32, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "tie_word_embeddings": True,
}  # fmt: skip
SMALLEST = LLAMA | {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}

# kind, its config, what `peft` is told
CASES: dict[str, tuple[str, dict, dict]] = {
    "all of a llama": ("Llama", LLAMA, {"target_modules": "all-linear", "r": 3, "lora_alpha": 5}),
    "query and value": ("Llama", LLAMA, {"target_modules": ["q_proj", "v_proj"], "r": 4}),
    "rank 1, one layer, one head": ("Llama", SMALLEST, {"target_modules": "all-linear", "r": 1}),
    "biases": ("Qwen2", LLAMA, {"target_modules": "all-linear", "r": 2, "lora_alpha": 2}),
    "gpt2": ("GPT2", GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3}),
    "gpt2, no query": ("GPT2", GPT2, {"target_modules": ["attn.c_proj", "c_fc"], "r": 2}),
}
TOKENS = np.random.default_rng(0).integers(0, V, (2, T), dtype=np.int32)


@functools.cache
def base(kind: str, case: str) -> Any:
    keys = CASES[case][1] | {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**keys)
    found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    torch.manual_seed(0)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


def saved(case: str, folder: Path) -> tuple[Path, Any]:
    """An adapter that does something, of a base, both as `peft` and `transformers` write them."""
    kind, _, how = CASES[case]
    base(kind, case).save_pretrained(folder / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", attn_implementation="eager"
    )
    told = peft.LoraConfig(**how, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(loaded, told).eval()
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(folder / "adapter")
    return folder / "adapter", theirs


def their_logits(found: Any) -> np.ndarray:
    with torch.no_grad():
        return found(torch.tensor(TOKENS).long()).logits.numpy()


def our_logits(found: pretrained.Pretrained) -> np.ndarray:
    return np.asarray(jax.jit(functools.partial(model.apply, found.model))(found.params, TOKENS))


def close(a: np.ndarray, b: np.ndarray, share: float = 1e-5) -> None:
    """To 1e-5 of the largest: float32 sums in another order."""
    np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_files_are_those_of_peft(case, tmp_path):
    folder, theirs = saved(case, tmp_path)
    found = pretrained.load(pretrained.read(folder))
    expected = their_logits(theirs)
    close(our_logits(found), expected)
    with theirs.disable_adapter():
        off = their_logits(theirs)
    assert np.abs(expected - off).max() > 0.1
    without = found._replace(params=trainable.without_adapters(found.params))
    close(our_logits(without), off)
    close(our_logits(found._replace(params=trainable.merged(found.model, found.params))), expected)

    # Gradients of A and B, by the files that both write of them.
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (theirs(torch.tensor(TOKENS).long()).logits * torch.tensor(weights)).sum().backward()

    def loss(factors: Any) -> Any:
        put = lambda x, f: x.replace(a=f[0], b=f[1]) if f is not None else x  # noqa: E731
        params = jax.tree.map(put, found.params, factors, is_leaf=adapted)
        return (model.apply(found.model, params, TOKENS) * weights).sum()

    factors = jax.tree.map(
        lambda x: (x.a, x.b) if adapted(x) else None, found.params, is_leaf=adapted
    )
    slopes = jax.jit(jax.grad(loss))(factors)
    put = lambda x, f: x.replace(a=f[0], b=f[1]) if f is not None else x  # noqa: E731
    gradient = jax.tree.map(put, found.params, slopes, is_leaf=adapted)
    ours.export(tmp_path / "gradient", found.model, gradient, "base", 0.0)
    told = load_file(tmp_path / "gradient" / ours.WEIGHTS)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        slope, mine = parameter.grad.numpy(), told[name.replace(".default", "")]
        if "c_attn.lora_A" in name:
            mine = mine.reshape(3, *slope.shape).sum(0)  # one A is three of ours
        if "c_attn.lora_B" in name:
            r = slope.shape[1]
            thirds = zip(np.split(mine, 3), range(3), strict=True)
            mine = np.concatenate([third[:, i * r : (i + 1) * r] for third, i in thirds])
        close(mine, slope)

    # Out again, and in again.
    ours.export(tmp_path / "out", found.model, found.params, str(tmp_path / "base"), 0.0)
    opened = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", attn_implementation="eager"
        ),
        tmp_path / "out",
    ).eval()
    close(their_logits(opened), expected, 1e-6 if "c_attn" in str(CASES[case][2]) else 0)
    again = pretrained.load(pretrained.read(tmp_path / "out"))
    assert again.params.keys() == found.params.keys()
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_array_equal(a, b)
    sent, back = (load_file(p / ours.WEIGHTS) for p in (folder, tmp_path / "out"))
    if "c_attn" not in str(CASES[case][2]["target_modules"]):
        assert sent.keys() == back.keys() and all((sent[k] == back[k]).all() for k in sent)
    assert jax.tree.structure(again.params) == jax.tree.structure(found.params)


def adapted(leaf: Any) -> bool:
    return isinstance(leaf, Adapted)


def launch(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"), tiny.TEXT * 4)


def words(store: Path, **knobs: Any) -> list[str]:
    """Of a run on a base, whose architecture is its own."""
    words = tiny.overrides(store, train__steps=4, mesh__data=1, model__context=16, **knobs)
    shape = ("layers", "width", "heads", "vocab_size")
    return [w for w in words if not w.startswith(tuple(f"--config.model.{k}=" for k in shape))]


def test_a_run_from_a_base_to_an_adapter_and_on_from_it(store, tmp_path, capsys):
    """Trained on a pretrained model, written alone and merged, opened by peft, trained on."""
    saved("all of a llama", tmp_path)
    how = [f"--config={tiny.RECIPE}", "--config.train.trainable=lora", "--config.train.lora_rank=2"]
    run, base = tmp_path / "run", tmp_path / "base"
    assert launch("train", *how, *words(store), f"--from={base}", f"--workdir={run}") == 0
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert losses[-1] < losses[0]
    for name, flag in (("alone", ["--adapter"]), ("merged", [])):
        assert launch("export", f"--workdir={run}", f"--out={tmp_path / name}", *flag) == 0
    assert "adapters merged, which moves logits by" in capsys.readouterr().out
    keys = json.loads((tmp_path / "alone" / ours.CONFIG).read_text())
    assert keys["base_model_name_or_path"] == str(base) and keys["r"] == 2
    assert keys["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"),
        tmp_path / "alone",
    ).eval()
    alone, merged = (
        pretrained.load(pretrained.read(tmp_path / name)) for name in ("alone", "merged")
    )
    with trained.opened(trained.find(run)) as model_of_run:
        leaves = jax.tree.leaves(model_of_run.params)
    assert all((a == b).all() for a, b in zip(leaves, jax.tree.leaves(alone.params), strict=True))
    close(our_logits(alone), their_logits(theirs))
    close(our_logits(merged), our_logits(alone))
    # The base is what it was.
    kept = pretrained.load(pretrained.read(base))
    off = trainable.without_adapters(alone.params)
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(off), jax.tree.leaves(kept.params), strict=True)
    )
    # It goes on where it was: the first loss is near the last, and what is trained is the adapter's.
    more, adapter = tmp_path / "more", tmp_path / "alone"
    how = [f"--config={tiny.RECIPE}", *words(store, seed=1)]
    assert launch("train", *how, f"--from={adapter}", f"--workdir={more}") == 0
    first = read_metrics(more)[0]["loss"]
    assert abs(first - losses[-1]) < abs(first - losses[0]) and first < losses[0]
    told = read_environment(more)[0]["initial"]
    assert told["model"] == str(adapter) and told["base"] == str(base)
    assert {ours.CONFIG, ours.WEIGHTS, "model.safetensors"} <= told["files"].keys()
    assert launch("export", f"--workdir={more}", f"--out={tmp_path / 'm'}", "--adapter") == 0
    keys = json.loads((tmp_path / "m" / ours.CONFIG).read_text())
    assert keys["base_model_name_or_path"] == str(base)
    capsys.readouterr()
    refused = [*how, "--config.train.trainable=all", f"--from={adapter}"]
    assert launch("train", *refused, f"--workdir={tmp_path / 'no'}") == 2
    assert "is an adapter, with which training goes on at" in capsys.readouterr().err
    assert launch("import", adapter, f"--out={tmp_path / 'imported'}") == 2
    assert f"is an adapter of {base}: `export` merges the two" in capsys.readouterr().err
    # Spoken with as it is.
    assert launch("generate", f"--workdir={adapter}", "--prompt=a", "--config.data.tokenizer=bytes",
                  "--config.sample.max_new_tokens=4") == 0  # fmt: skip


def test_merging_is_refused_where_logits_move(tmp_path, monkeypatch):
    folder, _ = saved("query and value", tmp_path)
    found = pretrained.load(pretrained.read(folder))
    moved = ours.merge(found.model, found.params)[1]
    assert 0 < moved < 2e-6
    monkeypatch.setattr(ours, "MERGED", moved / 2)
    with pytest.raises(UserError, match=r"would move logits by \d.*: export them by --adapter"):
        ours.merge(found.model, found.params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_rslora": True}, "an adapter with use_rslora is not supported"),
        ({"use_dora": True, "bias": "all"}, "an adapter with bias, use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save is not supported"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks or alphas of each module is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not LORA"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"r": "three"}, "adapter_config.json is damaged"),
        ({"r": 2}, "lora_A.weight is of shape"),
    ],
)
def test_adapters_that_we_do_not_compute_are_refused(change, message, tmp_path):
    folder, _ = saved("query and value", tmp_path)
    keys = json.loads((folder / ours.CONFIG).read_text())
    (folder / ours.CONFIG).write_text(json.dumps(keys | change))
    with pytest.raises(UserError, match=message):
        pretrained.load(pretrained.read(folder))


def test_tensors_that_lack_or_are_too_many_are_refused(tmp_path):
    folder, _ = saved("query and value", tmp_path)
    tensors = load_file(folder / ours.WEIGHTS)
    extra = tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 16), np.float32)}
    save_file(extra, folder / ours.WEIGHTS)
    with pytest.raises(UserError, match="no part of the model, the first of them .*lm_head.lora_A"):
        pretrained.load(pretrained.read(folder))
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, folder / ours.WEIGHTS)
    with pytest.raises(UserError, match=r"missing, the first of them .*layers.1.*q_proj.lora_B"):
        pretrained.load(pretrained.read(folder))
    (folder / ours.WEIGHTS).unlink()
    (folder / ours.PICKLE).write_bytes(b"")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle, which may run any program"):
        pretrained.read(folder)


def test_a_base_that_is_not_there_is_named(tmp_path):
    folder, _ = saved("query and value", tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(UserError, match="which is no pretrained model here: write where it is"):
        pretrained.read(folder)


def test_what_peft_has_no_place_for_is_not_written(tmp_path):
    config = tiny.model(feedforward="swiglu_experts", experts=4, position="rope", norm="rmsnorm",
                        bias=False, tied=False)  # fmt: skip
    whole = dataclasses.replace(tiny.BASE, model=config, train=tiny.train(trainable="lora"))
    params = trainable.trainable(whole).whole(
        *trainable.trainable(whole).split(model.init(config, 0))
    )
    with pytest.raises(UserError, match="no place for adapters of blocks/feedforward/down, "):
        ours.export(tmp_path / "out", config, params, "base", 0.0)
    with pytest.raises(UserError, match="the model has no adapters: export it whole"):
        ours.export(tmp_path / "out", config, model.init(config, 0), "base", 0.0)
