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
from gptjax.config import UserError, choose, from_dict, off_values
from gptjax.layers.feedforward import FEEDFORWARD, hidden_width

Keys = dict[str, Any]


class Row(NamedTuple):
    """One tensor.

    Attributes:
        ours: its path in the tree of `model.init`; a stacked one has a tensor for each layer, and for
            each expert.
        theirs: its name, * standing for the layer's number and ? for the expert's.
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
        reads: further keys that `to_model` reads. A key in none of these is refused.
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
    reads: tuple[str, ...]
    to_model: Callable[[Keys], dict[str, Any]]
    to_theirs: Callable[[ModelConfig], Keys]
    rows: tuple[Row, ...]


# Fields that say how a model is run or trained, not what function it is.
RUN_FIELDS = (
    "dropout", "init", "init_scale", "attention", "scan_layers", "remat", "dtype", "products",
    "balance_loss", "router_z_loss",
)  # fmt: skip


# Fields that say nothing of a feed-forward without experts.
EXPERT_FIELDS = (
    "experts", "experts_per_token", "shared_experts", "normalise_gates", "capacity_factor",
    "balance_rate",
)  # fmt: skip


# Keys of a config.json that leave the logits of a pretrained model as they are, whatever they say:
# where it came from, how it was trained, how text is generated from it, and other tasks' heads.
HARMLESS = frozenset(
    """
    model_type architectures _name_or_path _commit_hash transformers_version torch_dtype dtype
    transformers.js_config unsloth_version unsloth_fixed is_llama_config tokenizer_class
    attn_implementation _attn_implementation _attn_implementation_autoset use_cache pretraining_tp
    return_dict output_hidden_states output_attentions torchscript use_bfloat16
    tf_legacy_loss chunk_size_feed_forward gradient_checkpointing reorder_and_upcast_attn is_decoder
    initializer_range initializer_factor attention_dropout resid_pdrop embd_pdrop attn_pdrop n_ctx
    max_sequence_length bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
    finetuning_task task_specific_params problem_type id2label label2id num_labels
    output_router_logits router_aux_loss_coef router_jitter_noise
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
""".split()  # noqa: SIM905
)


def to_model(theirs: Keys) -> tuple[Family, ModelConfig]:
    """The family and our config of a Hugging Face config.json.

    Raises:
        UserError: on an unknown `model_type`, a key that is missing or not known (unless it says
            nothing: null, false, 0, empty), or a value that we do not compute.
    """
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type={kind!r} is not one of: {', '.join(FAMILIES)}")
    family, config = FAMILIES[kind], theirs
    if theirs.get("quantization_config"):
        raise UserError("the model is quantised (quantization_config): name its original weights")
    known_keys = HARMLESS | family.keys.keys() | family.theirs.keys() | {*family.reads}
    unknown = [key for key in config if key not in known_keys and config[key]]
    if unknown:
        raise UserError(
            f"the config of a {kind} has keys that are not known: {', '.join(sorted(unknown))}; take "
            "out those that do not change what the model computes"
        )
    for key, values in family.theirs.items():
        if config.get(key, values[0]) not in values:
            raise UserError(
                f"{key}={config[key]!r} of a {kind} is not one of: {', '.join(map(repr, values))}"
            )
    # What a family does not mention is off.
    fields = off_values(ModelConfig) | family.ours
    for key, (field, default) in family.keys.items():
        fields[field] = config.get(key, default)
        if fields[field] is ...:
            raise UserError(f"the config of a {kind} lacks {key}")
    model = from_dict(fields | family.to_model(config), ModelConfig, "model")
    # One spelling of equal configs, so that export and import give the same config back.
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
    target, nearest = canonical(model), None
    for kind, family in FAMILIES.items():
        explicit = dataclasses.asdict(model) | {
            "kv_heads": model.K, "head_dim": model.H, "ff_dim": hidden_width(model),
        }  # fmt: skip
        keys: Keys = {"model_type": kind, "architectures": [family.architecture]}
        keys |= {key: explicit[field] for key, (field, _) in family.keys.items()}
        keys |= {key: values[0] for key, values in family.theirs.items()}
        keys |= family.to_theirs(model)
        written = canonical(to_model(keys)[1])
        differ = [name for name in target if target[name] != written.get(name)]
        if not differ:
            return family, keys
        if nearest is None or len(differ) < len(nearest[1]):
            nearest = (kind, differ)
    assert nearest is not None
    values = ", ".join(f"model.{name}={target[name]!r}" for name in nearest[1])
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
    if not FEEDFORWARD[model.feedforward].experts:
        for name in EXPERT_FIELDS:
            del fields[name]
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
    reads=(),
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

ROPE = (
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings",
)  # fmt: skip
# RoPE scaling -> the keys that it reads besides `factor`; every other is refused.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast", "attention_factor", "truncate"),
}


def rope_to_model(theirs: Keys) -> dict[str, Any]:
    """The RoPE fields of `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`.

    As in transformers 5, `rope_scaling` wins over `rope_parameters` as a whole, and a number in
    either over one beside them, but for the original context.
    """
    rope: Keys = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"RoPE's parameters are to be an object, not {rope!r}")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    keys = choose(ROPE_KEYS, kind, "rope_type")
    common = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if rope.pop("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("partial_rotary_factor: RoPE on a part of each head is not supported")
    if unknown := sorted(rope.keys() - common - set(keys)):
        raise UserError(f"RoPE scaling {kind!r} with {', '.join(unknown)} is not supported")
    fields: Keys = {
        "rope_base": float(rope.get("rope_theta") or theirs.get("rope_theta") or 1e4),
        "rope_scaling": "none" if kind == "default" else kind,
    }
    if kind == "default":
        return fields
    if lacking := [key for key in ("factor", *keys[:2]) if kind != "yarn" and key not in rope]:
        raise UserError(f"RoPE scaling {kind!r} lacks {', '.join(lacking)}")
    context = theirs["max_position_embeddings"]
    original = theirs.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", context
    )
    # transformers 5 and GGUF let the factor be the ratio of the contexts.
    fields["rope_factor"] = factor = float(rope.get("factor", context / original))
    if kind != "linear":
        fields["rope_original_context"] = context if kind == "dynamic" else original
    if kind == "llama3":
        fields["rope_rotations"] = tuple(float(rope[key]) for key in keys)
    if kind == "yarn":
        fields["rope_rotations"] = float(rope.get(keys[0], 1)), float(rope.get(keys[1], 32))
        gain = 0.1 * math.log(factor) + 1
        if not rope.get("truncate", True) or abs(rope.get("attention_factor", gain) - gain) > 1e-6:
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


def windows_to_model(theirs: Keys, window: int | None) -> dict[str, Any]:
    """The field `windows` where `layer_types` says which layers have one; otherwise all have."""
    layers, types = theirs["num_hidden_layers"], theirs.get("layer_types")
    if types is None:
        return {"windows": (window,)}
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries for num_hidden_layers={layers}")
    table = {"full_attention": None, "sliding_attention": window}
    if window is None and "sliding_attention" in types:
        raise UserError("layer_types names sliding_attention, but there is no sliding_window")
    windows = tuple(choose(table, kind, "layer_types") for kind in types)
    return {"windows": windows[:1] if len({*windows}) == 1 else windows}


def windows_to_theirs(model: ModelConfig) -> Keys:
    windows = model.layer_windows
    keys: Keys = {"sliding_window": max((w for w in windows if w is not None), default=None)}
    if len({*windows}) > 1:
        names = ("full_attention" if w is None else "sliding_attention" for w in windows)
        keys["layer_types"] = [*names]
    return keys


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
    reads=(*ROPE, "mlp_bias", "attention_bias"),
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


def with_experts(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Llama's rows with a mixture of experts, whose names within a layer are given."""
    rows = [row for row in LLAMA_ROWS if not row.ours.startswith("blocks/feedforward/")]
    names = {"router": router, "gate": gate, "up": up, "down": down}
    layouts = {"router": "E D", "gate": "F D", "up": "F D", "down": "D F"}
    rows += [
        Row(f"blocks/feedforward/{ours}", f"model.layers.*.{theirs}.weight", layouts[ours])
        for ours, theirs in names.items()
    ]
    return tuple(rows)


# Without `use_sliding_window` the next three say nothing.
QWEN = (*ROPE, "layer_types", "sliding_window", "max_window_layers")

# By `model_type`; export takes the first that fits.
FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA._replace(  # Llama with a sliding window
        architecture="MistralForCausalLM",
        reads=(*ROPE, "sliding_window", "layer_types"),
        to_model=lambda theirs: (
            rope_to_model(theirs) | windows_to_model(theirs, theirs.get("sliding_window", 4096))
        ),
        to_theirs=lambda model: rope_to_theirs(model) | windows_to_theirs(model),
    ),
    "qwen2": LLAMA._replace(  # Llama with biases on query, key and value
        architecture="Qwen2ForCausalLM",
        ours=LLAMA.ours | {"attention_bias": "qkv"},
        theirs=LLAMA.theirs | {"use_sliding_window": (False,)},
        reads=QWEN,
        to_model=lambda theirs: rope_to_model(theirs) | windows_to_model(theirs, None),
        to_theirs=rope_to_theirs,
    ),
    "qwen3": LLAMA._replace(  # Llama with QK-norm
        architecture="Qwen3ForCausalLM",
        keys=LLAMA.keys | {"head_dim": ("head_dim", 128)},
        ours=LLAMA.ours | {"qk_norm": True},
        theirs=LLAMA.theirs | {"use_sliding_window": (False,)},
        reads=(*QWEN, "attention_bias"),
        to_model=lambda theirs: (
            rope_to_model(theirs)
            | windows_to_model(theirs, None)
            | {"attention_bias": "all" if theirs.get("attention_bias", False) else "none"}
        ),
        to_theirs=lambda model: rope_to_theirs(model) | {"attention_bias": "out" in model.biased},
    ),
    "mixtral": LLAMA._replace(  # Llama with experts; its layers have one window
        architecture="MixtralForCausalLM",
        keys=LLAMA.keys
        | {
            "num_key_value_heads": ("kv_heads", 8),
            "rms_norm_eps": ("norm_eps", 1e-5),
            "num_local_experts": ("experts", 8),
            "num_experts_per_tok": ("experts_per_token", 2),
        },
        ours=LLAMA.ours | {"feedforward": "swiglu_experts"},
        reads=(*ROPE, "sliding_window"),
        to_model=lambda theirs: (
            rope_to_model({"rope_theta": 1e6} | theirs)
            | {"windows": (theirs.get("sliding_window"),)}
        ),
        to_theirs=lambda model: rope_to_theirs(model) | {"sliding_window": model.layer_windows[0]},
        rows=with_experts(
            "block_sparse_moe.gate",
            *(f"block_sparse_moe.experts.?.{name}" for name in ("w1", "w3", "w2")),
        ),
    ),
    "qwen3_moe": LLAMA._replace(  # Llama with QK-norm and experts in every layer
        architecture="Qwen3MoeForCausalLM",
        keys={theirs: ours for theirs, ours in LLAMA.keys.items() if ours[0] != "ff_dim"}
        | {
            "num_key_value_heads": ("kv_heads", 4),
            "moe_intermediate_size": ("ff_dim", 768),
            "num_experts": ("experts", 128),
            "num_experts_per_tok": ("experts_per_token", 8),
            "norm_topk_prob": ("normalise_gates", False),
        },
        ours=LLAMA.ours | {"qk_norm": True, "feedforward": "swiglu_experts"},
        theirs=LLAMA.theirs
        | {
            "use_sliding_window": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
        },
        # `intermediate_size` is of layers without experts; transformers 5 counts experts as local.
        reads=(*QWEN, "attention_bias", "intermediate_size", "num_local_experts"),
        to_model=lambda theirs: (
            rope_to_model(theirs)
            | {"experts": theirs.get("num_local_experts", theirs.get("num_experts", 128))}
            | {"attention_bias": "all" if theirs.get("attention_bias", False) else "none"}
        ),
        to_theirs=lambda model: rope_to_theirs(model) | {"attention_bias": "out" in model.biased},
        rows=with_experts(
            "mlp.gate", *(f"mlp.experts.?.{name}_proj" for name in ("gate", "up", "down"))
        ),
    ),
}
