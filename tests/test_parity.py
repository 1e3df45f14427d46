"""Logits and gradients against the reference implementations in `transformers`.

Tiny models with random weights, norms and biases included, so that nothing passes by being 1
or 0. The mapping of weights is spelled out here and shares nothing with the package.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import accounting
from gptjax import model as gpt
from gptjax.config import Model
from gptjax.losses import cross_entropy
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

B, T, V, L, D, N, K, F = 2, 24, 96, 3, 32, 4, 2, 56
TOKENS = np.random.default_rng(0).integers(V, size=(B, T)).astype(np.int32)

GPT2 = tiny.model(vocab_size=V, context=T, layers=L, width=D, heads=N, ff_dim=F)
LLAMA = dataclasses.replace(
    GPT2, kv_heads=K, position="rope", rope_base=500.0, norm="rmsnorm", norm_eps=1e-6, bias=False,
    feedforward="swiglu", tied=False,
)  # fmt: skip
QWEN3 = dataclasses.replace(LLAMA, head_dim=12, qk_norm=True, tied=True)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=N, n_inner=F,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
        )
    )  # fmt: skip


def modern(config: Any, language_model: Any, model: Model) -> Any:
    return language_model(
        config(
            vocab_size=V, max_position_embeddings=T, hidden_size=D, num_hidden_layers=L,
            num_attention_heads=N, num_key_value_heads=K, head_dim=model.H, intermediate_size=F,
            rms_norm_eps=1e-6, tie_word_embeddings=model.tied, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    )  # fmt: skip


def llama() -> Any:
    return modern(transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA)


def qwen3() -> Any:
    return modern(transformers.Qwen3Config, transformers.Qwen3ForCausalLM, QWEN3)


Weights = dict[str, np.ndarray]


def from_gpt2(w: Weights) -> gpt.Params:
    """Conv1D stores (in, out); query, key and value stand side by side."""
    H = D // N

    def stack(name: str, *shape: int) -> np.ndarray:
        return np.stack([w[f"transformer.h.{i}.{name}"] for i in range(L)]).reshape(L, *shape)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stack(f"{name}.weight", D), "bias": stack(f"{name}.bias", D)}

    qkv, qkv_bias = stack("attn.c_attn.weight", D, 3, N, H), stack("attn.c_attn.bias", 3, N, H)
    names = ("query", "key", "value")
    return {
        "embed": {"tokens": w["transformer.wte.weight"], "positions": w["transformer.wpe.weight"]},
        "blocks": {
            "attention_norm_in": norm("ln_1"),
            "feedforward_norm_in": norm("ln_2"),
            "attention": {
                **{name: qkv[:, :, i] for i, name in enumerate(names)},
                **{f"{name}_bias": qkv_bias[:, i] for i, name in enumerate(names)},
                "out": stack("attn.c_proj.weight", N, H, D),
                "out_bias": stack("attn.c_proj.bias", D),
            },
            "feedforward": {
                "up": stack("mlp.c_fc.weight", D, F),
                "up_bias": stack("mlp.c_fc.bias", F),
                "down": stack("mlp.c_proj.weight", F, D),
                "down_bias": stack("mlp.c_proj.bias", D),
            },
        },
        "final_norm": {
            "scale": w["transformer.ln_f.weight"],
            "bias": w["transformer.ln_f.bias"],
        },
    }


def from_modern(w: Weights, model: Model) -> gpt.Params:
    """Linear stores (out, in)."""
    H = model.H

    def stack(name: str) -> np.ndarray:
        return np.stack([w[f"model.layers.{i}.{name}.weight"] for i in range(L)])

    def project(name: str, heads: int) -> np.ndarray:
        return stack(f"self_attn.{name}_proj").swapaxes(1, 2).reshape(L, D, heads, H)

    attention: dict[str, Any] = {
        "query": project("q", N),
        "key": project("k", K),
        "value": project("v", K),
        "out": stack("self_attn.o_proj").swapaxes(1, 2).reshape(L, N, H, D),
    }
    if model.qk_norm:
        attention |= {
            "query_norm": {"scale": stack("self_attn.q_norm")},
            "key_norm": {"scale": stack("self_attn.k_norm")},
        }
    params: gpt.Params = {
        "embed": {"tokens": w["model.embed_tokens.weight"]},
        "blocks": {
            "attention_norm_in": {"scale": stack("input_layernorm")},
            "feedforward_norm_in": {"scale": stack("post_attention_layernorm")},
            "attention": attention,
            "feedforward": {
                name: stack(f"mlp.{name}_proj").swapaxes(1, 2) for name in ("gate", "up", "down")
            },
        },
        "final_norm": {"scale": w["model.norm.weight"]},
    }
    return params if model.tied else params | {"unembed": {"kernel": w["lm_head.weight"].T}}


CASES = {
    "gpt2": (GPT2, gpt2, from_gpt2),
    "llama": (LLAMA, llama, lambda w: from_modern(w, LLAMA)),
    "qwen3": (QWEN3, qwen3, lambda w: from_modern(w, QWEN3)),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name):
    model, build, convert = CASES[name]
    reference = build().eval()
    generator = torch.Generator().manual_seed(0)
    for key, p in reference.named_parameters():
        # Gains near 1, all else near 0, at a scale at which every part has a say.
        gain = key.endswith("weight") and ("norm" in key or ".ln_" in key)
        mean = 1.0 if gain else 0.0
        p.data = mean + 0.2 * torch.randn(p.shape, generator=generator)

    out = reference(torch.tensor(TOKENS, dtype=torch.long), labels=torch.tensor(TOKENS).long())
    out.loss.backward()  # mean over all but the first token of each row
    weights = {key: value.detach().numpy() for key, value in reference.state_dict().items()}
    tree = jax.tree.map(jnp.asarray, convert(weights))
    shapes = jax.tree.map(lambda s: s.shape, gpt.abstract_params(model))
    assert jax.tree.map(jnp.shape, tree) == shapes
    assert sum(p.numel() for p in reference.parameters()) == accounting.parameters(model)["total"]

    def loss(params: gpt.Params) -> tuple[jax.Array, jax.Array]:
        x_BTD = gpt.hidden(model, params, TOKENS).x_BTD
        x_BTD, kernel, dims = gpt.unembedding(model, params, x_BTD)
        weights_BT = jnp.ones((B, T)).at[:, -1].set(0)
        sums = cross_entropy(
            x_BTD, kernel, dims, jnp.roll(TOKENS, -1, axis=1), weights_BT,
            chunk=None, softcap=None, z_loss=0.0,
        )  # fmt: skip
        return sums.nll / sums.weight, gpt.logits(model, params, x_BTD)

    (value, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree)
    expected = out.logits.detach().numpy()
    assert expected.std() > 1
    assert abs(np.asarray(logits_BTV) - expected).max() < 3e-5  # seen: 1.1e-5 at most
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-6)

    # A gradient has the layout of its weight, so that the same mapping serves.
    grads = {k: p.grad.numpy() for k, p in reference.named_parameters()}
    wanted = convert(grads)

    def compare(path: Any, got: jax.Array, want: np.ndarray) -> None:
        # Seen: 4e-6 of the largest at most.
        # Softmax does not see a bias of the keys: its gradient is rounding alone, near 1e-9.
        error = abs(np.asarray(got) - want).max() / max(abs(want).max(), 1e-3)
        assert error < 2e-5, f"{jax.tree_util.keystr(path)}: {error:.2g}"

    jax.tree.map_with_path(compare, gradients, wanted)
