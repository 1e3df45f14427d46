"""Families of pretrained models: whose config and tensors are which of ours.

A family is one entry of `FAMILIES`, read in both directions: `to_model` and `to_theirs`
translate configs, and a `Row` says where a tensor of theirs stands in our tree and how it lies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gptjax.config import Model as ModelConfig
from gptjax.config import UserError, choose, off_values
from gptjax.layers.feedforward import hidden_width

Keys = dict[str, Any]


class Row(NamedTuple):
    """One tensor.

    Attributes:
        ours: its path in the tree of `model.init`; a stacked one has a tensor for each layer.
        theirs: its name, * standing for the layer's number.
        layout: its dims, in our letters; those written together are one dim: "NH D".
        part: (i, n): it is the i-th of n equal parts of the last dim.
    """

    ours: str
    theirs: str
    layout: str
    part: tuple[int, int] = (0, 1)


class Family(NamedTuple):
    """A kind of model, as Hugging Face's `model_type` names it.

    Attributes:
        architecture: the class in `transformers`.
        prefix: of all tensors but `lm_head.weight`; old files lack it.
        buffers: a pattern of names that hold no parameter.
        keys: key of theirs -> (field of ours, the value where the key is absent; ... is none).
        ours: fields of ours that are alike in the whole family.
        theirs: key of theirs that would change the function -> values for which it is what we
            compute, the first of which is written. An absent key counts as it.
        to_model: their config -> further fields of ours.
        to_theirs: our config -> further keys of theirs.
        rows: the tensors; those whose path the model does not have are passed over.
    """

    architecture: str
    prefix: str
    buffers: str
    keys: dict[str, tuple[str, Any]]
    ours: dict[str, Any]
    theirs: dict[str, tuple[Any, ...]]
    to_model: Callable[[Keys], dict[str, Any]]
    to_theirs: Callable[[ModelConfig], Keys]
    rows: tuple[Row, ...]


# Fields that say how a model is run or trained, not what function it is.
RUN_FIELDS = ("dropout", "init", "init_scale", "attention", "scan_layers", "remat", "dtype")


def to_model(theirs: Keys) -> tuple[Family, ModelConfig]:
    """The family and our config of a Hugging Face config.json.

    Raises:
        UserError: on an unknown `model_type`, a missing key, or a value that we do not compute.
    """
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type={kind!r} is not one of: {', '.join(FAMILIES)}")
    family, told = FAMILIES[kind], theirs
    if theirs.get("quantization_config"):
        raise UserError("the model is quantised (quantization_config): name its original weights")
    for key, values in family.theirs.items():
        if told.get(key, values[0]) not in values:
            raise UserError(
                f"{key}={told[key]!r} of a {kind} is not one of: {', '.join(map(repr, values))}"
            )
    # What a family does not mention is off.
    fields = off_values(ModelConfig) | family.ours
    for key, (field, default) in family.keys.items():
        fields[field] = told.get(key, default)
        if fields[field] is ...:
            raise UserError(f"the config of a {kind} lacks {key}")
    model = ModelConfig(**(fields | family.to_model(told)))
    # One way to say the same, so that a config comes back as it went.
    return family, dataclasses.replace(
        model,
        kv_heads=None if model.heads == model.K else model.K,
        head_dim=None if model.H * model.heads == model.width else model.H,
        ff_dim=hidden_width(model),
    )


def to_theirs(model: ModelConfig) -> tuple[Family, Keys]:
    """The first family that can say `model`, and its config.json.

    Raises:
        UserError: where none can; it names what the nearest lacks.
    """
    wanted, nearest = canonical(model), None
    for kind, family in FAMILIES.items():
        explicit = dataclasses.asdict(model) | {
            "kv_heads": model.K, "head_dim": model.H, "ff_dim": hidden_width(model),
        }  # fmt: skip
        keys: Keys = {"model_type": kind, "architectures": [family.architecture]}
        keys |= {key: explicit[field] for key, (field, _) in family.keys.items()}
        keys |= {key: values[0] for key, values in family.theirs.items()}
        keys |= family.to_theirs(model)
        said = canonical(to_model(keys)[1])
        differ = [name for name in wanted if wanted[name] != said.get(name)]
        if not differ:
            return family, keys
        if nearest is None or len(differ) < len(nearest[1]):
            nearest = (kind, differ)
    assert nearest is not None
    values = ", ".join(f"model.{name}={wanted[name]!r}" for name in nearest[1])
    raise UserError(
        f"no family of Hugging Face ({', '.join(FAMILIES)}) can say this model; "
        f"the nearest, {nearest[0]}, lacks {values}"
    )


def canonical(model: ModelConfig) -> dict[str, Any]:
    """What function a model computes: equal for configs that say the same in other words."""
    fields = {k: v for k, v in dataclasses.asdict(model).items() if k not in RUN_FIELDS}
    fields |= {"kv_heads": model.K, "head_dim": model.H, "ff_dim": hidden_width(model)}
    fields |= {"windows": model.layer_windows, "attention_bias": sorted(model.biased)}
    read = {"none": (), "linear": ("factor",), "dynamic": ("factor", "original_context")}
    unread = {"factor", "original_context", "rotations"} - set(
        read.get(model.rope_scaling, ("factor", "original_context", "rotations"))
    )
    if model.position != "rope":
        unread |= {"base", "scaling", "factor", "original_context", "rotations"}
    return {k: v for k, v in fields.items() if k.removeprefix("rope_") not in unread}


# --- GPT-2 ----------------------------------------------------------------------------------

GPT2_ROWS = (
    Row("embed/tokens", "transformer.wte.weight", "V D"),
    Row("embed/positions", "transformer.wpe.weight", "P D"),
    Row("blocks/attention_norm_in/scale", "transformer.h.*.ln_1.weight", "D"),
    Row("blocks/attention_norm_in/bias", "transformer.h.*.ln_1.bias", "D"),
    Row("blocks/attention/query", "transformer.h.*.attn.c_attn.weight", "D NH", (0, 3)),
    Row("blocks/attention/key", "transformer.h.*.attn.c_attn.weight", "D KH", (1, 3)),
    Row("blocks/attention/value", "transformer.h.*.attn.c_attn.weight", "D KH", (2, 3)),
    Row("blocks/attention/query_bias", "transformer.h.*.attn.c_attn.bias", "NH", (0, 3)),
    Row("blocks/attention/key_bias", "transformer.h.*.attn.c_attn.bias", "KH", (1, 3)),
    Row("blocks/attention/value_bias", "transformer.h.*.attn.c_attn.bias", "KH", (2, 3)),
    Row("blocks/attention/out", "transformer.h.*.attn.c_proj.weight", "NH D"),
    Row("blocks/attention/out_bias", "transformer.h.*.attn.c_proj.bias", "D"),
    Row("blocks/feedforward_norm_in/scale", "transformer.h.*.ln_2.weight", "D"),
    Row("blocks/feedforward_norm_in/bias", "transformer.h.*.ln_2.bias", "D"),
    Row("blocks/feedforward/up", "transformer.h.*.mlp.c_fc.weight", "D F"),
    Row("blocks/feedforward/up_bias", "transformer.h.*.mlp.c_fc.bias", "F"),
    Row("blocks/feedforward/down", "transformer.h.*.mlp.c_proj.weight", "F D"),
    Row("blocks/feedforward/down_bias", "transformer.h.*.mlp.c_proj.bias", "D"),
    Row("final_norm/scale", "transformer.ln_f.weight", "D"),
    Row("final_norm/bias", "transformer.ln_f.bias", "D"),
    Row("unembed/kernel", "lm_head.weight", "V D"),
)

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    buffers=r"\.attn\.(bias|masked_bias)$",
    keys={
        "vocab_size": ("vocab_size", ...),
        "n_positions": ("context", ...),
        "n_layer": ("layers", ...),
        "n_embd": ("width", ...),
        "n_head": ("heads", ...),
        "n_inner": ("ff_dim", None),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tied", True),
    },
    ours={"feedforward": "gelu", "position": "learned", "norm": "layernorm", "bias": True},
    theirs={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    to_model=lambda theirs: {},
    to_theirs=lambda model: {},
    rows=GPT2_ROWS,
)

# --- Llama and its kin ----------------------------------------------------------------------

LLAMA_ROWS = (
    Row("embed/tokens", "model.embed_tokens.weight", "V D"),
    Row("blocks/attention_norm_in/scale", "model.layers.*.input_layernorm.weight", "D"),
    Row("blocks/attention/query", "model.layers.*.self_attn.q_proj.weight", "NH D"),
    Row("blocks/attention/query_bias", "model.layers.*.self_attn.q_proj.bias", "NH"),
    Row("blocks/attention/query_norm/scale", "model.layers.*.self_attn.q_norm.weight", "H"),
    Row("blocks/attention/key", "model.layers.*.self_attn.k_proj.weight", "KH D"),
    Row("blocks/attention/key_bias", "model.layers.*.self_attn.k_proj.bias", "KH"),
    Row("blocks/attention/key_norm/scale", "model.layers.*.self_attn.k_norm.weight", "H"),
    Row("blocks/attention/value", "model.layers.*.self_attn.v_proj.weight", "KH D"),
    Row("blocks/attention/value_bias", "model.layers.*.self_attn.v_proj.bias", "KH"),
    Row("blocks/attention/out", "model.layers.*.self_attn.o_proj.weight", "D NH"),
    Row("blocks/attention/out_bias", "model.layers.*.self_attn.o_proj.bias", "D"),
    Row("blocks/feedforward_norm_in/scale", "model.layers.*.post_attention_layernorm.weight", "D"),
    Row("blocks/feedforward/gate", "model.layers.*.mlp.gate_proj.weight", "F D"),
    Row("blocks/feedforward/gate_bias", "model.layers.*.mlp.gate_proj.bias", "F"),
    Row("blocks/feedforward/up", "model.layers.*.mlp.up_proj.weight", "F D"),
    Row("blocks/feedforward/up_bias", "model.layers.*.mlp.up_proj.bias", "F"),
    Row("blocks/feedforward/down", "model.layers.*.mlp.down_proj.weight", "D F"),
    Row("blocks/feedforward/down_bias", "model.layers.*.mlp.down_proj.bias", "D"),
    Row("final_norm/scale", "model.norm.weight", "D"),
    Row("unembed/kernel", "lm_head.weight", "V D"),
)

# RoPE scaling -> the keys that it reads besides `factor`; every other is refused.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast", "attention_factor", "truncate"),
}


def rope_to_model(theirs: Keys) -> dict[str, Any]:
    """The RoPE fields of `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
    told: Keys = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    told = {key: value for key, value in told.items() if value is not None}
    kind = str(told.get("rope_type", told.get("type", "default")))
    keys = choose(ROPE_KEYS, kind, "rope_type")
    common = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if told.pop("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("partial_rotary_factor: RoPE on a part of each head is not supported")
    if unknown := sorted(told.keys() - common - set(keys)):
        raise UserError(f"RoPE scaling {kind!r} with {', '.join(unknown)} is not supported")
    fields: Keys = {
        "rope_base": float(told.get("rope_theta") or theirs.get("rope_theta") or 1e4),
        "rope_scaling": "none" if kind == "default" else kind,
    }
    if kind == "default":
        return fields
    if lacking := [key for key in ("factor", *keys[:2]) if kind != "yarn" and key not in told]:
        raise UserError(f"RoPE scaling {kind!r} lacks {', '.join(lacking)}")
    context = theirs["max_position_embeddings"]
    original = told.get("original_max_position_embeddings", context)
    # transformers 5 and GGUF let the factor be the ratio of the contexts.
    fields["rope_factor"] = factor = float(told.get("factor", context / original))
    if kind != "linear":
        fields["rope_original_context"] = context if kind == "dynamic" else original
    if kind == "llama3":
        fields["rope_rotations"] = tuple(float(told[key]) for key in keys)
    if kind == "yarn":
        fields["rope_rotations"] = float(told.get(keys[0], 1)), float(told.get(keys[1], 32))
        gain = 0.1 * math.log(factor) + 1
        if not told.get("truncate", True) or abs(told.get("attention_factor", gain) - gain) > 1e-6:
            raise UserError("yarn with attention_factor or truncate of its own is not supported")
    return fields


def rope_to_theirs(model: ModelConfig) -> Keys:
    """The keys of transformers 4, which 5 reads as well."""
    m, kind = model, model.rope_scaling
    keys: Keys = {"rope_theta": m.rope_base, "rope_scaling": None}
    if kind == "none":
        return keys
    keys["rope_scaling"] = scaling = {"rope_type": kind, "factor": m.rope_factor}
    if kind in ("llama3", "yarn"):
        scaling |= dict(zip(ROPE_KEYS[kind], m.rope_rotations, strict=False))
        scaling["original_max_position_embeddings"] = m.rope_original_context
    return keys


def _windows(theirs: Keys) -> dict[str, Any]:
    return {"windows": (theirs.get("sliding_window", 4096),)}


LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    buffers=r"\.rotary_emb\.inv_freq$",
    keys={
        "vocab_size": ("vocab_size", ...),
        "max_position_embeddings": ("context", ...),
        "num_hidden_layers": ("layers", ...),
        "hidden_size": ("width", ...),
        "num_attention_heads": ("heads", ...),
        "num_key_value_heads": ("kv_heads", None),
        "head_dim": ("head_dim", None),
        "intermediate_size": ("ff_dim", ...),
        "rms_norm_eps": ("norm_eps", 1e-6),
        "tie_word_embeddings": ("tied", False),
    },
    ours={"feedforward": "swiglu", "position": "rope", "norm": "rmsnorm", "init": "fan_in"},
    theirs={"hidden_act": ("silu", "swish")},
    to_model=lambda theirs: (
        rope_to_model(theirs)
        | {
            "bias": theirs.get("mlp_bias", False),
            "attention_bias": "all" if theirs.get("attention_bias", False) else "none",
        }
    ),
    to_theirs=lambda model: (
        rope_to_theirs(model) | {"mlp_bias": model.bias, "attention_bias": "out" in model.biased}
    ),
    rows=LLAMA_ROWS,
)

# By `model_type`; export takes the first that fits.
FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA._replace(  # Llama with a sliding window
        architecture="MistralForCausalLM",
        to_model=lambda theirs: rope_to_model(theirs) | _windows(theirs),
        to_theirs=lambda model: rope_to_theirs(model) | {"sliding_window": model.windows[0]},
    ),
    "qwen2": LLAMA._replace(  # Llama with biases on query, key and value
        architecture="Qwen2ForCausalLM",
        ours=LLAMA.ours | {"attention_bias": "qkv"},
        theirs=LLAMA.theirs | {"use_sliding_window": (False,)},
        to_model=rope_to_model,
        to_theirs=rope_to_theirs,
    ),
    "qwen3": LLAMA._replace(  # Llama with QK-norm
        architecture="Qwen3ForCausalLM",
        keys=LLAMA.keys | {"head_dim": ("head_dim", 128)},
        ours=LLAMA.ours | {"qk_norm": True},
        theirs=LLAMA.theirs | {"use_sliding_window": (False,)},
        to_model=lambda theirs: (
            rope_to_model(theirs)
            | {"attention_bias": "all" if theirs.get("attention_bias", False) else "none"}
        ),
        to_theirs=lambda model: rope_to_theirs(model) | {"attention_bias": "out" in model.biased},
    ),
}
