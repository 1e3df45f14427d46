"""Hugging Face folders in and out, against `transformers` itself with random weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from gptjax import model, sharding, state, trained
from gptjax.config import Config, UserError
from gptjax.configure import from_file
from gptjax.data.batches import Batch
from gptjax.interop import families, hf, pretrained
from gptjax.interop.pretrained import adopt, import_, load, read
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).parents[1]
T = 24
GPT2 = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
# Beyond the original context of 8, so that stretching shows; base 100, so that it does soon.
STRETCHED = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
TURNS = {"low_freq_factor": 0.5, "high_freq_factor": 1.5}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}

CASES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "llama": ("Llama", LLAMA),
    "llama-mha-tied": ("Llama", LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", LLAMA | {"head_dim": 8}),
    "llama-attention-bias": ("Llama", LLAMA | {"attention_bias": True}),
    "llama-mlp-bias": ("Llama", LLAMA | {"mlp_bias": True}),
    "llama-linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama-dynamic": (
        "Llama",
        LLAMA
        | {"max_position_embeddings": 8}
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama-llama3": (
        "Llama", LLAMA | {"rope_parameters": {"rope_type": "llama3"} | STRETCHED | TURNS},
    ),
    "llama-yarn": (
        "Llama",
        LLAMA
        | {"head_dim": 16}
        | {"rope_parameters": {"rope_type": "yarn", "beta_slow": 0.05, "beta_fast": 0.6} | STRETCHED},
    ),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 5}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "mixtral-window": (
        "Mixtral",
        LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 5},
    ),
    "qwen3_moe": ("Qwen3Moe", LLAMA | EXPERTS),
    "qwen3_moe-normalised": (
        "Qwen3Moe", LLAMA | EXPERTS | {"norm_topk_prob": True, "head_dim": 8, "attention_bias": True},
    ),
}  # fmt: skip


@functools.cache
def theirs(case: str):
    """A model of `transformers` with every parameter drawn, gains and biases included."""
    kind, keys = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**keys)
    found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    torch.manual_seed(0)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return found.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """case -> a folder that `transformers` wrote; not to be changed."""
    root = tmp_path_factory.mktemp("theirs")

    def saved(case: str) -> Path:
        if not (root / case).exists():
            theirs(case).save_pretrained(root / case)
        return root / case

    return saved


TOKENS = np.random.default_rng(0).integers(0, 50, (2, T), dtype=np.int32)


def our_logits(found: pretrained.Pretrained) -> np.ndarray:
    config = dataclasses.replace(found.model, scan_layers=True)
    return np.asarray(jax.jit(functools.partial(model.apply, config))(found.params, TOKENS))


def their_logits(found) -> np.ndarray:
    with torch.no_grad():
        return found(torch.tensor(TOKENS).long()).logits.numpy()


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and bool((x == y).all())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def stored(path: Path) -> dict:
    return {
        k: v
        for f in sorted(path.glob("*.safetensors"))
        for k, v in safetensors.load_file(f).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_with_the_same_logits_and_bits(case, folder, tmp_path):
    found = load(read(folder(case)))
    expected = their_logits(theirs(case))
    assert expected.std() > 0.3  # or 1e-4 would say little
    np.testing.assert_allclose(our_logits(found), expected, atol=1e-4)

    hf.export(tmp_path / "out", found.model, found.params, None)
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # The very weights in the very model: its logits are bitwise what they were.
    np.testing.assert_array_equal(their_logits(again.eval()), expected)

    sent, back = stored(folder(case)), stored(tmp_path / "out")
    assert sent.keys() == back.keys() and all(torch.equal(sent[k], back[k]) for k in sent)
    returned = load(read(tmp_path / "out"))
    assert returned.model == found.model and equal(returned.params, found.params)


def test_every_family_and_every_scaling_is_a_case():
    kinds = {getattr(transformers, f"{kind}Config").model_type for kind, _ in CASES.values()}
    assert kinds == set(families.FAMILIES)
    scalings = {to_model(case).rope_scaling for case in CASES}
    assert scalings == set(families.ROPE_KEYS) - {"default"} | {"none"}


def to_model(case: str):
    return families.to_model(json.loads(theirs(case).config.to_json_string()))[1]


def test_the_config_of_transformers_4_says_the_same(folder):
    keys = json.loads((folder("llama-llama3") / "config.json").read_text())
    rope = keys.pop("rope_parameters")
    old = keys | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert families.to_model(old)[1] == to_model("llama-llama3")


# Config keys -> what `transformers` makes of them, beside what a model has already.
OURS = {"rope_type": "yarn", "factor": 4.0, "beta_slow": 0.05, "beta_fast": 0.6}
TOLD: dict[str, tuple[str, dict]] = {
    "rope_scaling wins": (
        "qwen2", {"rope_scaling": OURS | {"original_max_position_embeddings": 8}}
    ),
    "and takes the base beside it": (
        "llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 50.0}
    ),
    "but not of what it replaces": (
        "llama-linear", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    ),
    "an empty one does not": ("llama-linear", {"rope_scaling": {}}),
    "the original context beside yarn": (
        "llama", {"rope_parameters": OURS | {"rope_theta": 100.0}, "original_max_position_embeddings": 8}
    ),
    "beside yarn that has its own": (
        "llama-yarn", {"original_max_position_embeddings": 16}
    ),
    "beside llama3": ("llama-llama3", {"original_max_position_embeddings": 16}),
    "beside linear": ("llama-linear", {"original_max_position_embeddings": 8}),
    "the base beside and inside": ("llama-linear", {"rope_theta": 7.0}),
    "a window on some layers": (
        "mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    ),
    "a window on none": ("mistral", {"layer_types": ["full_attention"] * 3}),
    "a window on all": ("mistral", {"layer_types": ["sliding_attention"] * 3}),
    "a window that is null": ("mistral", {"sliding_window": None}),
    "no window where it is off": ("qwen2", {"sliding_window": 4, "max_window_layers": 1}),
    "harmless keys": (
        "llama",
        {
            "initializer_range": 0.5, "attention_dropout": 0.4, "pretraining_tp": 2, "use_cache": False,
            "bos_token_id": 7, "eos_token_id": [1, 2], "id2label": {"0": "a"}, "prefix": "x",
            "chunk_size_feed_forward": 3, "gradient_checkpointing": True, "unsloth_fixed": True,
            "is_llama_config": True, "rope_interleaved": False, "never_heard_of": None,
            "_name_or_path": "x", "transformers.js_config": {"dtype": "q4"}, "torch_dtype": "bfloat16",
        },
    ),
    "harmless keys of gpt2": (
        "gpt2",
        {
            "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "n_ctx": 8,
            "summary_type": "last", "task_specific_params": {"x": {}}, "num_labels": 5,
            "reorder_and_upcast_attn": True, "pruned_heads": {},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_a_config_means_what_transformers_makes_of_it(case, folder, tmp_path):
    which, keys = TOLD[case]
    source = changed(folder(which), tmp_path / "in", **keys)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32
    )
    expected = their_logits(again.eval())
    np.testing.assert_allclose(our_logits(load(read(source))), expected, atol=1e-4)
    # What is imported says the same.
    import_(source, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    )
    np.testing.assert_allclose(their_logits(again.eval()), expected, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_key_that_is_not_known_is_refused(case):
    kind, keys = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**keys)
    written = json.loads(config.to_json_string(use_diff=False)) | {"model_type": config.model_type}
    families.to_model(written)  # all that transformers writes is known
    for value in (1, True, "x", [0], {"a": 1}, 0.5):
        with pytest.raises(UserError, match="has keys that are not known: clip_qkv; take out"):
            families.to_model(written | {"clip_qkv": value})
    assert families.to_model(written | {"clip_qkv": None}) == families.to_model(written)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_come_back_as_they_were(dtype, tmp_path):
    theirs("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    theirs.cache_clear()
    assert import_(tmp_path / "in", tmp_path / "out") == to_model("llama")
    sent, back = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert all(v.dtype == getattr(torch, dtype) for v in sent.values())
    assert sent.keys() == back.keys() and all(torch.equal(sent[k], back[k]) for k in sent)
    assert load(read(tmp_path / "out")).dtype == dtype


def test_several_files_under_an_index(folder, tmp_path):
    theirs("llama").save_pretrained(tmp_path / "in", max_shard_size="10KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    assert equal(load(read(tmp_path / "in")).params, load(read(folder("llama"))).params)


def candidates(folder: Path, source: Path) -> None:
    """Weights of `source` in shards under an index, and other weights in other files."""
    theirs("llama").save_pretrained(folder, max_shard_size="10KB")
    tensors = {name: torch.zeros_like(value) for name, value in stored(source).items()}
    safetensors.save_file(tensors, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")


def test_weights_are_those_that_transformers_reads(folder, tmp_path, capsys):
    capsys.readouterr()
    old = tmp_path / "in"
    candidates(old, folder("llama"))
    assert equal(load(read(old)).params, load(read(folder("llama"))).params)
    told = capsys.readouterr().err
    assert "read model-00001-of-0" in told
    assert "not consolidated.safetensors and 1 more" in told
    assert "model.safetensors.index.json" not in told

    new = {name: value + 1 for name, value in stored(folder("llama")).items()}
    safetensors.save_file(new, old / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(old).state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in new.items())
    found = load(read(old)).params
    assert not equal(found, load(read(folder("llama"))).params)
    np.testing.assert_array_equal(found["final_norm"]["scale"], new["model.norm.weight"].numpy())
    assert (
        "in: read model.safetensors, not consolidated.safetensors and " in capsys.readouterr().err
    )
    load(read(folder("llama")))
    assert capsys.readouterr().err == ""  # where there is no choice

    # A run is begun with these weights: the others do not matter to its resuming.
    before = trained.start_of(old).fingerprint
    (old / "consolidated.safetensors").write_bytes(b"other")
    assert trained.start_of(old).fingerprint == before
    safetensors.save_file(stored(folder("llama")), old / "model.safetensors")
    assert trained.start_of(old).fingerprint != before


def test_names_without_prefix_and_buffers_of_old_files(folder, tmp_path):
    tensors = {k.removeprefix("transformer."): v for k, v in stored(folder("gpt2")).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.ones(())}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    changed(folder("gpt2"), tmp_path / "in", tensors)
    assert equal(load(read(tmp_path / "in")).params, load(read(folder("gpt2"))).params)


# --- meshes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, axes",
    [
        ("gpt2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("llama-attention-bias", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("mixtral", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_on_a_mesh_each_device_gets_its_shard_of_the_same_values(case, axes, folder, tmp_path):
    plain = load(read(folder(case)))
    mesh = tiny.mesh(**axes)
    with jax.set_mesh(mesh):
        split = load(read(folder(case)))
        specs = model.abstract_params(split.model)
        for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(split.params), strict=True):
            assert leaf.sharding == NamedSharding(mesh, sharding.parameter_spec(spec.dims))
        hf.export(tmp_path / "out", split.model, split.params, None)
    for a, b in zip(jax.tree.leaves(split.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    sent, back = stored(folder(case)), stored(tmp_path / "out")
    assert all(torch.equal(sent[k], back[k]) for k in sent)


def test_a_mesh_that_does_not_divide_is_refused(folder):
    mesh = tiny.mesh(data=2, tensor=4)
    with (
        jax.set_mesh(mesh),
        pytest.raises(UserError, match=r"=\d+ does not divide over mesh axes tensor = 4"),
    ):
        load(read(folder("llama")))


MEMORY = """
import re, sys
from pathlib import Path
from gptjax.interop.pretrained import import_, load, read
from tests import tiny
# Not ru_maxrss, which a process has from its parent on Linux.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
small, big, out = sys.argv[1:]
import_(small, out + "-small")  # the code itself is loaded and compiled
load(read(small))
before = peak()
import_(big, out)
imported = peak() - before
params = load(read(big)).params
print(imported, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_importing_takes_little_more_memory_than_the_weights(folder, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20}
    config = transformers.LlamaConfig(**LLAMA | sizes | {"vocab_size": 16000})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "big")
    paths = folder("llama"), tmp_path / "big", tmp_path / "out"
    words = [sys.executable, "-c", MEMORY, *map(str, paths)]
    environment = os.environ | {"XLA_FLAGS": ""}
    run = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights > 300e6
    imported, loaded = (int(word) / weights for word in run.stdout.split())
    assert imported < 0.7  # a tensor at a time, though never less than the largest
    assert 0.95 < loaded < 1.3  # the largest tensor, a table, is a tenth of the weights


# --- training on ----------------------------------------------------------------------------


def test_training_goes_on_from_the_imported_loss(folder):
    words = ["--config.model.scan_layers=True", f"--config.model.context={T}"]
    config = adopt(from_file(str(ROOT / "configs" / "base.py"), words), read(folder("llama")))
    assert (config.model.context, config.model.scan_layers) == (T, True)  # of the run
    start = state.create(config).replace(params=load(read(folder("llama"))).params)
    rows = Batch(
        TOKENS[:, :-1],
        TOKENS[:, 1:],
        np.ones((2, T - 1), np.float32),
        positions=np.broadcast_to(np.arange(T - 1, dtype=np.int32), (2, T - 1)),
    )
    batch = jax.tree.map(lambda x: jnp.asarray(x)[:, None], rows)
    _, metrics = state.make_train_step(config)(start, batch)
    ids = torch.tensor(TOKENS).long()
    with torch.no_grad():
        expected = theirs("llama")(ids, labels=ids).loss.item()
    assert float(metrics["loss"]) == pytest.approx(expected, abs=1e-5)


def test_learned_positions_keep_their_number(folder):
    config: Config = from_file(str(ROOT / "configs" / "base.py"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, context=8))
    assert adopt(config, read(folder("gpt2"))).model.context == 32
    assert adopt(config, read(folder("llama"))).model.context == 8


# --- refusals -------------------------------------------------------------------------------


def changed(source: Path, out: Path, tensors: dict | None = None, **keys) -> Path:
    """A copy of a folder with other tensors or other keys in config.json."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps(config))
    tensors = stored(source) if tensors is None else tensors
    safetensors.save_file(tensors, out / "model.safetensors")
    return out


def refusal(source: Path, out: Path) -> str:
    """What is said of a folder; and nothing is left of the attempt."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        import_(source, out)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "case, keys, message",
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba' is not one of: gpt2, llama"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' of a llama is not one of: 'silu'"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function='gelu' of a gpt2"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not"),
        ("llama", {"rope_parameters": ROPE | {"mscale": 2.0}}, "'yarn' with mscale"),
        ("llama", {"rope_parameters": ROPE | {"attention_factor": 2.0}}, "attention_factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks factor"),
        ("llama", {"quantization_config": {"bits": 4}}, "the model is quantised"),
        ("llama", {"num_hidden_layers": 4}, "9 tensors are missing, the first of them model.lay"),
        ("llama", {"num_hidden_layers": 2}, "9 tensors are no part of the model"),
        ("llama", {"hidden_size": 32}, "weight is of shape [50, 16], where the config asks for"),
        ("llama", {"num_attention_heads": 3}, "model.heads=3 is not a multiple of model.kv_heads=2"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight differs from the token table"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden"),
        ("mistral", {"layer_types": ["conv"] * 3}, "layer_types='conv' is not one of: full_att"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "but there is no sliding_window"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True of a qwen2 is not one of"),
        ("llama", {"rope_parameters": [1]}, "RoPE's parameters are to be an object, not [1]"),
        ("mixtral", {"num_local_experts": 5}, "9 tensors are missing, the first of them model.layers"),
        ("mixtral", {"num_experts_per_tok": 5}, "model.experts_per_token=5 exceeds model.experts=4"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] of a qwen3_moe is not one of"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 of a qwen3_moe is not"),
        ("llama", {"hidden_size": "16"}, "model.width must be int, got '16'"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "has keys that are not known: pruned_heads; take out"),
        ("gpt2", {"hidden_size": 8}, "has keys that are not known: hidden_size"),
    ],
)  # fmt: skip
def test_what_is_not_ours_is_refused_in_a_line(case, keys, message, folder, tmp_path):
    source = changed(folder(case), tmp_path / "in", **keys)
    told = refusal(source, tmp_path / "out")
    assert message in told and told.startswith(str(source))


def test_a_key_that_is_missing_is_named(folder, tmp_path):
    source = changed(folder("llama"), tmp_path / "in")
    keys = json.loads((source / "config.json").read_text())
    del keys["hidden_size"]
    (source / "config.json").write_text(json.dumps(keys))
    assert "the config of a llama lacks hidden_size" in refusal(source, tmp_path / "out")


def test_a_truncated_file_is_refused(folder, tmp_path):
    source = changed(folder("llama"), tmp_path / "in")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "model.safetensors is truncated or damaged" in refusal(source, tmp_path / "out")


def test_a_missing_file_of_an_index_is_named(tmp_path):
    theirs("llama").save_pretrained(tmp_path / "in", max_shard_size="10KB")
    file = sorted((tmp_path / "in").glob("*.safetensors"))[1]
    file.unlink()
    assert f"names {file.name}, which is missing" in refusal(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("entry", ["../x.safetensors", "/x.safetensors", None, 3])
def test_an_index_that_leads_elsewhere_is_refused(entry, folder, tmp_path):
    source = changed(folder("llama"), tmp_path / "in")
    (source / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {} if entry is None else {"model.norm.weight": entry}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json is damaged" in refusal(source, tmp_path / "out")


def test_weights_by_another_name_twice_or_with_an_adapter_are_refused(folder, tmp_path):
    source = changed(folder("llama"), tmp_path / "in")
    (source / "adapter_config.json").write_text("{}")
    assert "it holds an adapter" in refusal(source, tmp_path / "out")
    (source / "adapter_config.json").unlink()
    (source / "model.safetensors").rename(source / "weights.safetensors")
    told = refusal(source, tmp_path / "out")
    assert "holds weights.safetensors, but neither model.safetensors nor model.safetens" in told
    tensors = stored(source)
    safetensors.save_file(
        tensors | {"norm.weight": tensors["model.norm.weight"] + 1}, source / "model.safetensors"
    )
    assert "model.norm.weight is there twice, as model.norm.weight in" in refusal(
        source, tmp_path / "out"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, folder, tmp_path):
    tensors = stored(folder("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 2] = value
    source = changed(folder("llama"), tmp_path / "in", tensors)
    told = refusal(source, tmp_path / "out")
    assert told.startswith(f"{source}: {name} has values that are no finite float32: fetch")
    with pytest.raises(UserError, match=f"{name} has values that are no finite float32"):
        hf.export(tmp_path / "out", load(read(source)).model, load(read(source)).params, None)
    assert not (tmp_path / "out").exists()


def test_values_beyond_a_dtype_are_refused(folder, tmp_path):
    found = load(read(folder("llama")))
    found.params["final_norm"]["scale"] *= 1e6
    with pytest.raises(
        UserError, match=r"model\.norm\.weight has values that are no finite float16: choose"
    ):
        hf.export(tmp_path / "out", found.model, found.params, None, "float16")
    assert not list(tmp_path.iterdir())
    hf.export(tmp_path / "out", found.model, found.params, None, "bfloat16")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason(name, folder, tmp_path):
    source = changed(folder("llama"), tmp_path / "in")
    (source / "model.safetensors").rename(source / name)
    told = refusal(source, tmp_path / "out")
    assert name in told and "may run any program when it is opened" in told


def test_integers_and_other_folders_are_refused(folder, tmp_path):
    tensors = {k: v.to(torch.int8) for k, v in stored(folder("llama")).items()}
    source = changed(folder("llama"), tmp_path / "in", tensors)
    assert "='I8' is not one of: F32, BF16, F16" in refusal(source, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "it holds no config.json" in refusal(tmp_path / "empty", tmp_path / "out")
    (source / "model.safetensors").unlink()
    assert "it holds no .safetensors file" in refusal(source, tmp_path / "out")
    (source / "config.json").write_text("[1")
    told = refusal(source, tmp_path / "out")
    assert told.startswith(f"{source / 'config.json'} is damaged, it is no JSON object")


def test_a_folder_that_exists_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists: name a folder" in refusal(folder("llama"), tmp_path / "out")


def test_a_write_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_safetensors", full)
    assert "No space left on device" in refusal(folder("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    "change, lacking",
    [
        ({"attention_softcap": 5.0}, "the nearest, llama, lacks model.attention_softcap=5.0"),
        ({"parallel_block": True}, "model.parallel_block=True"),
        ({"value_residual": True}, "model.value_residual=True"),
        ({"feedforward": "relu2"}, "model.feedforward='relu2'"),
        ({"windows": (4, 8)}, "model.windows=(4, 8, 4)"),
        ({"feedforward": "gelu_experts"}, "model.feedforward='gelu_experts'"),
        ({"feedforward": "swiglu_experts", "shared_experts": 1}, "model.shared_experts=1"),
        ({"feedforward": "swiglu_experts", "capacity_factor": 2.0}, "model.capacity_factor=2.0"),
    ],
)
def test_a_model_that_no_family_can_say_is_not_exported(change, lacking, folder, tmp_path):
    config = dataclasses.replace(to_model("llama"), **change)
    with pytest.raises(UserError) as caught:
        hf.export(tmp_path / "out", config, load(read(folder("llama"))).params, None)
    assert lacking in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["gpt2", "modern", "shakespeare"])
def test_models_of_recipes_can_be_exported(recipe):
    config = from_file(str(ROOT / "configs" / f"{recipe}.py")).model
    family, keys = families.to_theirs(config)
    assert families.canonical(families.to_model(keys)[1]) == families.canonical(config)
    paths = {row.ours for row in family.rows}
    names = jax.tree_util.tree_leaves_with_path(model.abstract_params(config))
    assert {"/".join(part.key for part in path) for path, _ in names} <= paths
