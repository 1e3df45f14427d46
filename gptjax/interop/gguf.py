"""GGUF files, llama.cpp's format: Llama's architecture, with its own tokenizer.

Weights are dequantised, but for those of `read_params`, which stay in `layers.blocks`. The `gguf`
package reads the file and knows every quantisation. This module translates it to a Hugging Face
folder: keys, names of tensors, the vocabulary, and the order of query and key rows, which the
conversion to GGUF interleaves, because llama.cpp rotates neighbouring channels where Llama in
`transformers` rotates halves.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax import model as gpt
from gptjax.config import Model, UserError, choose
from gptjax.interop import hf
from gptjax.interop.families import Family, Keys, Row, to_model
from gptjax.interop.tokenizer_files import BYTES, split, tokenizer_json
from gptjax.layers.blocks import KINDS, Blocks
from gptjax.layers.parameter import Spec
from gptjax.layers.position import ROPE_SCALING, frequencies
from gptjax.locks import scratch
from gptjax.tokenizer import TOKENIZER_FILE

# Name in the file -> Hugging Face's.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.*.attn_norm.weight": "model.layers.*.input_layernorm.weight",
    "blk.*.attn_q.weight": "model.layers.*.self_attn.q_proj.weight",
    "blk.*.attn_k.weight": "model.layers.*.self_attn.k_proj.weight",
    "blk.*.attn_v.weight": "model.layers.*.self_attn.v_proj.weight",
    "blk.*.attn_output.weight": "model.layers.*.self_attn.o_proj.weight",
    "blk.*.attn_q.bias": "model.layers.*.self_attn.q_proj.bias",
    "blk.*.attn_k.bias": "model.layers.*.self_attn.k_proj.bias",
    "blk.*.attn_v.bias": "model.layers.*.self_attn.v_proj.bias",
    "blk.*.attn_output.bias": "model.layers.*.self_attn.o_proj.bias",
    "blk.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "blk.*.ffn_gate.weight": "model.layers.*.mlp.gate_proj.weight",
    "blk.*.ffn_up.weight": "model.layers.*.mlp.up_proj.weight",
    "blk.*.ffn_down.weight": "model.layers.*.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INTERLEAVED = re.compile(r"\.(q|k)_proj\.")  # rows of a head: 0, H/2, 1, H/2 + 1, ...
ORIGINAL = "original_max_position_embeddings"
ROPE_FREQUENCIES = "rope_freqs.weight"  # divisors of RoPE's frequencies: llama3's scaling

# Key in the file, after "llama." -> key of Hugging Face.
KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}

# Further keys after "llama.": read below, or they change nothing. Any other is refused.
KNOWN = {
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.dimension_count", "attention.value_length", "vocab_size",
    "tensor_data_layout",
}  # fmt: skip

# GPT-2's pattern and Llama 3's, as their tokenizer.json has them.
_GPT2 = BYTES | {"use_regex": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how text is cut into pieces.
PRE: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": split(_LLAMA3),
    "qwen2": split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}
# Those of them with which llama.cpp puts the begin token before a text, unless add_bos_token says no.
BEGINS = ("llama-bpe",)
# Name of a token in tokenizer_config.json -> key, after "tokenizer.ggml.".
PARTS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id", "pad_token": "padding_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of token; 6 is a byte of SentencePiece


def import_(source: Path, out: Path, quantised: bool = False) -> Model:
    """Writes a GGUF file as the Hugging Face folder `out`, and returns its architecture.

    Args:
        quantised: the weights stay in the file, which is copied, not dequantised.

    Raises:
        UserError: if it is no GGUF file of a Llama, its tokenizer is no byte-level BPE, a tensor
            is missing, misshapen or left over, or `out` exists.
    """
    with hf.about(source), scratch() as vocabulary:
        reader, fields = _open(source)
        write_tokenizer(fields, vocabulary)
        tensors = Tensors(reader, fields)
        family, config = to_model(tensors.config)
        if not quantised:
            hf.copy(tensors, family, config, out, str(vocabulary))
            return config
        shapes = hf.check_tensors(tensors, config, *hf.rows_of(family, config))
        for name, shape in shapes.items():
            values = tensors.read(name, (slice(None),) * len(shape))
            if not np.isfinite(values).all():
                hf.refuse_not_finite(name, values, tensors.dtype)
        copy = lambda folder: shutil.copyfile(source, folder / hf.GGUF)  # noqa: E731
        hf.write_folder(out, config, str(vocabulary), tensors.dtype, copy)
    return config


def open_(path: Path) -> Tensors:
    """The weights that `import_` left in a GGUF file.

    Raises:
        UserError: if it is damaged, or the package is missing.
    """
    return Tensors(*_open(path))


def read_params(tensors: Tensors, family: Family, config: Model) -> gpt.Params:
    """As `hf.read_params`, for one device: weights in blocks of `layers.blocks.KINDS` stay so."""
    specs, rows = hf.rows_of(family, config)
    hf.check_tensors(tensors, config, specs, rows)
    held = {path: tensors.blocks(rows[path], spec) for path, spec in specs.items()}
    blocks = {path: found for path, found in held.items() if found is not None}
    others = {path: spec for path, spec in specs.items() if path not in blocks}
    arrays = flatten_dict(hf.read_arrays(tensors, others, rows), sep="/")
    return unflatten_dict(blocks | arrays, sep="/")


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The reader of a file, and what its keys say."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"reading GGUF needs the `gguf` package ({error}): pip install 'gptjax[gguf]'"
        ) from None
    if not path.is_file():
        raise UserError("there is no such file")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises whatever numpy does
        raise UserError(f"it is no GGUF file, or truncated ({error}): fetch it again") from None
    # The reader keeps an object for each token of the vocabulary: as much as small weights.
    reader.fields.clear()
    return reader, fields


class Tensors:
    """A `hf.Source` over a GGUF file."""

    dtype = "float32"

    def __init__(self, reader: Any, fields: Mapping[str, Any]) -> None:
        self._tensors: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for tensor in reader.tensors:
            number = re.search(r"^blk\.(\d+)\.", tensor.name)
            layer = number[1] if number else "*"
            name = NAMES.get(re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name), tensor.name)
            self._tensors[name.replace("*", layer)] = tensor
            self.shapes[name.replace("*", layer)] = tuple(int(n) for n in tensor.shape[::-1])
        self.config = _config(fields, self.shapes)
        divisors = self._tensors.pop(ROPE_FREQUENCIES, None)
        if divisors is not None:
            del self.shapes[ROPE_FREQUENCIES]
            self.config["rope_scaling"] = _llama3(divisors.data, self.config)
        heads = self.config["num_attention_heads"]
        self._heads = {"q": heads, "k": self.config.get("num_key_value_heads", heads)}

    def read(self, name: str, index: hf.Index) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        # Blocks of a quantisation lie along the last dim, so rows come apart but columns do not.
        with np.errstate(invalid="ignore"):  # what is not finite, others refuse
            array = gguf.dequantize(tensor.data[index[0]], tensor.tensor_type)
        return self._in_order(name, array[(slice(None), *index[1:])])

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows as Hugging Face has them: of whole heads."""
        projection = INTERLEAVED.search(name)
        if projection is None:
            return rows
        width = self.shapes[name][0] // self._heads[projection[1]]
        pairs = rows.reshape(-1, width // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def blocks(self, row: Row, spec: Spec) -> Blocks | None:
        """A parameter as the file has it; None: it is in no blocks of ours, or not in each layer.

        A tensor of Llama has a row for each output, along which blocks lie.
        """
        names = [name for _, name in hf.copies(row, spec)]
        kinds = {self._tensors[name].tensor_type.name for name in names}
        if len(kinds) > 1 or not kinds <= KINDS.keys():
            return None
        data = np.stack([self._in_order(name, self._tensors[name].data) for name in names])
        outputs = [spec.shape[spec.dims.index(dim)] for dim in spec.stacks + spec.fan_out]
        return Blocks(jax.device_put(data.reshape(*outputs, -1)), kinds.pop())


def _config(fields: Mapping[str, Any], shapes: Mapping[str, Any]) -> Keys:
    """The config.json that says what the file's keys say."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise UserError(f"a GGUF file of architecture {kind!r} is not supported: llama is")
    if fields.get("llama.expert_count", 0):
        raise UserError("a mixture of experts is not supported")
    keys: Keys = {"model_type": "llama", "tie_word_embeddings": "lm_head.weight" not in shapes}
    keys["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in shapes
    keys["vocab_size"] = shapes.get("model.embed_tokens.weight", (0,))[0]
    for suffix, key in KEYS.items():
        if f"llama.{suffix}" in fields:
            keys[key] = fields[f"llama.{suffix}"]
        if isinstance(keys.get(key), list):
            raise UserError(f"llama.{suffix} differs between layers, which is not supported")
    known_keys = {f"llama.{key}" for key in KNOWN | KEYS.keys()}
    unknown = [k for k, v in fields.items() if k.startswith("llama.") and k not in known_keys and v]
    if unknown:
        raise UserError(
            f"it has keys that are not known, which may change what the model computes: {unknown[0]}"
            f"{f' and {len(unknown) - 1} more' if unknown[1:] else ''}"
        )
    head = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.get(f"llama.{key}", head) != head:
            raise UserError(
                f"llama.{key}={fields[f'llama.{key}']} is not the width of a head, {head}"
            )
    # Stored as float32: 1e-5 comes back as 9.999999747378752e-06.
    keys |= {key: float(str(np.float32(v))) for key, v in keys.items() if isinstance(v, float)}
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        rope_scaling = {"type": scaling, "factor": fields.get("llama.rope.scaling.factor")}
        rope_scaling[ORIGINAL] = fields.get("llama.rope.scaling.original_context_length")
        keys["rope_scaling"] = rope_scaling
    return keys


def _llama3(divisors: np.ndarray, config: Keys) -> Keys:
    """The scaling that divides RoPE's frequencies so: Meta's, of whatever factor."""
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), ORIGINAL: 8192}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = to_model(config | {"rope_scaling": scaling})[1]
    expected = frequencies(model) / ROPE_SCALING["llama3"].frequencies(model, jnp.zeros((1, 1)))
    if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-4):
        raise UserError(f"{ROPE_FREQUENCIES} is no scaling of Llama 3's, which is not supported")
    return scaling


def write_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """Writes the vocabulary and the chat template of a GGUF file as Hugging Face has them."""

    def ggml(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    if ggml("model") != "gpt2":
        raise UserError(
            f"its tokenizer is of the kind {ggml('model')!r}, but only byte-level BPE ('gpt2') is "
            "supported"
        )
    pre = choose(PRE, ggml("pre", "default"), "tokenizer.ggml.pre")
    tokens, kinds = ggml("tokens"), ggml("token_type")
    of_kind = lambda kind: {t: i for i, t in enumerate(tokens) if kinds[i] == kind}  # noqa: E731
    specials = of_kind(CONTROL)
    for key in ("add_eos_token", "add_sep_token"):
        if ggml(key, False):
            raise UserError(f"tokenizer.ggml.{key}: a token after every text is not supported")
    bos = None
    if ggml("add_bos_token", ggml("pre") in BEGINS):
        if ggml("bos_token_id") is None:
            raise UserError("it wants a begin token before every text, but has no bos_token_id")
        bos = tokens[ggml("bos_token_id")]
    tree = tokenizer_json(
        of_kind(NORMAL) | specials,
        [tuple(merge.split(" ")) for merge in ggml("merges")],
        specials,
        pre,
        # Llama 3's vocabulary came from tiktoken, for which a piece that is a token is one.
        whole_pieces=ggml("pre") == "llama-bpe",
        others=of_kind(USER_DEFINED),
        bos=bos,
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in PARTS.items():
        if ggml(key) is not None:
            settings[name] = tokens[ggml(key)]
    files = {TOKENIZER_FILE: tree, "tokenizer_config.json": settings}
    # Whatever llama.cpp takes for the end of what is said (llama_vocab::impl::load).
    ends = {ggml(key) for key in ENDS if ggml(key) is not None}
    ends |= {i for i, text in enumerate(tokens) if text in END_NAMES and i in specials.values()}
    files["generation_config.json"] = {"eos_token_id": sorted(ends)}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    if template := fields.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
