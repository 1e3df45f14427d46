"""GGUF files, written here as llama.cpp's conversion writes them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import chat, configure, decode, model, speak, tokenizer, trained
from gptjax.config import UserError
from gptjax.interop.pretrained import import_, load, read
from gptjax.layers.blocks import Blocks

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Q8, Q40, Q41, F32, F16 = (
    gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "F32", "F16")
)
N, K, H, D, F, L, V = 4, 2, 8, 32, 64, 2, 262
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"


@functools.cache
def theirs(llama3: bool = False, bias: bool = False, tied: bool = False):
    rope = {"rope_type": "default", "rope_theta": 100.0}
    if llama3:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        rope["rope_theta"] = 500000.0
    config = transformers.LlamaConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=D, num_hidden_layers=L,
        num_attention_heads=N, num_key_value_heads=K, intermediate_size=F, rms_norm_eps=1e-5,
        rope_parameters=rope, attention_bias=bias, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    found = transformers.LlamaForCausalLM(config)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(
    path: Path,
    kind=F32,
    leave_out: str = "",
    extra: bool = False,
    keys=None,
    pre: str = "smollm",
    **which,
) -> Path:
    """The model `theirs(**which)` as a GGUF file, its matrices of a kind, or of that of their name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_block_count(L)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0 if which.get("llama3") else 100.0)
    spelled = tokenizer.byte_alphabet()
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *map(spelled.get, range(256)),
        "th",
        "the",
        "<t>",
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * 258, 4])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, value in theirs(**which).state_dict().items():
        stem, _, end = name.rpartition(".")
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleave(array, N if "q_proj" in name else K)
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        known = stem if layer is None else stem.removeprefix(f"model.layers.{layer}.")
        full = f"{'' if layer is None else f'blk.{layer}.'}{NAMES[known]}.{end}"
        if full == leave_out or (which.get("tied") and full == "output.weight"):
            continue
        how = F32 if array.ndim < 2 else kind(full) if callable(kind) else kind
        writer.add_tensor(full, gguf.quantize(array, how), raw_dtype=how)
    if which.get("llama3"):
        config = theirs(**which).config
        scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        plain = 500000.0 ** -(np.arange(0, H, 2) / H)
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))
    if extra:
        writer.add_tensor("blk.0.odd.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


IDS = np.random.default_rng(0).integers(0, V, (1, 24), dtype=np.int32)


@pytest.mark.parametrize(
    "which", [{}, {"bias": True}, {"tied": True}, {"llama3": True}], ids=lambda w: "".join(w) or "plain"
)  # fmt: skip
def test_a_file_has_the_logits_of_its_original(which, tmp_path):
    found = import_(write(tmp_path / "x.gguf", **which), tmp_path / "out")
    if which.get("llama3"):
        assert (found.rope_scaling, found.rope_original_context) == ("llama3", 8192)
        assert found.rope_factor == pytest.approx(8.0, rel=1e-6)
    got = load(read(tmp_path / "out"))
    assert got.model == found and got.tokenizer == str(tmp_path / "out")
    config = dataclasses.replace(found, scan_layers=True)
    ours = jax.jit(functools.partial(model.apply, config))(got.params, IDS)
    with torch.no_grad():
        expected = theirs(**which)(torch.tensor(IDS).long()).logits.numpy()
    assert expected.std() > 0.3
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [Q8, F16], ids=["Q8_0", "F16"])
def test_tensors_are_dequantised_exactly(kind, tmp_path):
    import_(write(tmp_path / "x.gguf", kind), tmp_path / "out")
    params, original = load(read(tmp_path / "out")).params, theirs().state_dict()
    name = "model.layers.1.self_attn.{}_proj.weight"

    def dequantised(name: str) -> np.ndarray:
        array = original[name].numpy()
        return gguf.dequantize(gguf.quantize(array, kind), kind)

    attention = params["blocks"]["attention"]
    # Blocks lie within rows, so quantising and reordering rows commute.
    q_DNH = dequantised(name.format("q")).reshape(N, H, D).transpose(2, 0, 1)
    np.testing.assert_array_equal(attention["query"][1], q_DNH)
    v_DKH = dequantised(name.format("v")).reshape(K, H, D).transpose(2, 0, 1)
    np.testing.assert_array_equal(attention["value"][1], v_DKH)
    table = params["embed"]["tokens"]
    np.testing.assert_array_equal(table, dequantised("model.embed_tokens.weight"))
    assert not (np.asarray(table) == original["model.embed_tokens.weight"].numpy()).all()


def leaves(params) -> dict[str, object]:
    flat = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, Blocks))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def mixed(name: str):
    """As files come: the table in 8 bits, a matrix of other kinds in other layers, one of float16."""
    if "token_embd" in name:
        return Q8
    return {"blk.0.ffn_down.weight": Q8, "blk.1.attn_v.weight": F16}.get(name, Q41)


@pytest.mark.parametrize(
    "kind, which, plain",
    [
        (Q8, {}, 0), (Q40, {"bias": True}, 0), (Q41, {"tied": True}, 0),
        (mixed, {"tied": True}, 2), (F16, {}, 9),
    ],
    ids=["Q8_0", "Q4_0", "Q4_1", "mixed", "F16"],
)  # fmt: skip
def test_text_is_written_from_the_blocks_of_a_file(kind, which, plain, tmp_path):
    source = write(tmp_path / "x.gguf", kind, **which)
    found = import_(source, tmp_path / "kept", quantised=True)
    assert found == import_(source, tmp_path / "wide")
    assert (tmp_path / "kept" / "model.gguf").read_bytes() == source.read_bytes()
    names = {path.name for path in (tmp_path / "kept").iterdir()} ^ {
        path.name for path in (tmp_path / "wide").iterdir()
    }
    assert names == {"model.gguf", "model.safetensors"}
    wide = load(read(tmp_path / "wide"))
    # All but generation, such as training, finds the same weights as ever.
    jax.tree.map(np.testing.assert_array_equal, load(read(tmp_path / "kept")).params, wide.params)
    import_(tmp_path / "kept", tmp_path / "again")
    tensors = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("wide", "again")]
    assert tensors[0] == tensors[1]
    config = dataclasses.replace(found, context=32)
    opened = trained.find(tmp_path / "kept", overrides=["--config.model.context=32"])
    with speak.opened(opened) as speaker:
        params = speaker.weights.params
        each = leaves({**params, "blocks": params["blocks"][1]})
        matrices = [name for name in each if leaves_a_matrix(name)]
        held = {name for name, leaf in each.items() if isinstance(leaf, Blocks)}
        assert held <= {*matrices} and len(matrices) - len(held) == plain
        sample = dataclasses.replace(speaker.config.sample, max_new_tokens=12, temperature=0.0)
        prompts = [IDS[0, :9].tolist(), IDS[0, 9:14].tolist()]
        write_texts = functools.partial(
            decode.generate, config, prompts=prompts, sample=sample, seed=0, vocab_size=V,
            end_of_text=0,
        )  # fmt: skip
        blocks = load(read(tmp_path / "kept"), blocks=True).params
        # Sums in one order: the texts, and all that decides them, are the same to the last bit.
        assert write_texts(blocks) == write_texts(wide.params)
    with speak.opened(opened._replace(config=configure.override(opened.config, ["--config.model.products=int8"]))) as speaker:  # fmt: skip
        assert not any(isinstance(leaf, Blocks) for leaf in leaves(speaker.weights.params).values())


def leaves_a_matrix(name: str) -> bool:
    return "norm" not in name and "bias" not in name


def test_a_quantised_file_of_another_width_is_refused(tmp_path):
    content = write(tmp_path / "x.gguf", Q41).read_bytes()
    at = content.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4
    assert content[at] == D
    (tmp_path / "x.gguf").write_bytes(content[:at] + bytes([48]) + content[at + 1 :])
    assert "is not a multiple of Q4_1 block size (32)" in refusal(tmp_path, quantised=True)


def test_factors_that_are_not_finite_are_refused(tmp_path):
    content = write(tmp_path / "x.gguf", Q41).read_bytes()
    array = interleave(theirs().state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy(), N)
    row = gguf.quantize(array, Q41)[3].tobytes()
    assert content.count(row) == 1
    broken = np.float16(np.inf).tobytes() + row[2:]
    (tmp_path / "x.gguf").write_bytes(content.replace(row, broken))
    message = "model.layers.1.self_attn.q_proj.weight has values that are no finite float32"
    assert message in refusal(tmp_path, quantised=True)


def test_only_a_file_of_blocks_stays_quantised(tmp_path):
    import_(write(tmp_path / "x.gguf"), tmp_path / "wide")
    with pytest.raises(UserError, match=r"wide is no \.gguf file, of which alone weights stay"):
        import_(tmp_path / "wide", tmp_path / "out", quantised=True)


def test_its_tokenizer_and_template_come_along(tmp_path):
    import_(write(tmp_path / "x.gguf"), tmp_path / "out")
    own = tokenizer.load(str(tmp_path / "out"))
    byte = {char: 3 + i for i, char in enumerate(map(chr, range(256)))}
    assert own.encode("the th 12<|im_end|>")[:5] == [260, byte[" "], 259, byte[" "], byte["1"]]
    assert own.encode("a<t>") == [byte["a"], 261]  # a token of the vocabulary's makers, no special
    assert (own.eot, own.stops, own.bos) == (0, {0, 2}, None)
    assert chat.encode(own, [{"role": "user", "content": "the"}]) == [1, 260, 2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"leave_out": "blk.1.ffn_up.weight"}, "1 tensors are missing, the first of them model.la"),
        ({"extra": True}, "the first of them blk.0.odd.weight"),
        ({"keys": {"llama.expert_count": 8}}, "a mixture of experts"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "rope_type='longrope' is not one of"),
        (
            {"keys": {"llama.attention.sliding_window": 7}},
            "may change what the model computes: llama.att",
        ),
        (
            {"keys": {"llama.rope.scaling.attn_factor": 0.5, "llama.logit_scale": 2.0}},
            " and 1 more",
        ),
        (
            {"keys": {"llama.rope.dimension_count": 4}},
            "dimension_count=4 is not the width of a head, 8",
        ),
        (
            {"keys": {"llama.attention.value_length": 4}},
            "value_length=4 is not the width of a head, 8",
        ),
        (
            {"keys": {"tokenizer.ggml.add_eos_token": True}},
            "add_eos_token: a token after every text",
        ),
        (
            {"keys": {"tokenizer.ggml.add_bos_token": True}},
            "wants a begin token before every text, but",
        ),
    ],
)
def test_what_is_not_ours_is_refused(changes, message, tmp_path):
    write(tmp_path / "x.gguf", **changes)
    assert message in refusal(tmp_path)


# What llama.cpp puts before a text: `add_bos` of each pre-tokeniser in its src/llama-vocab.cpp, which
# the key, where it is there, overrules.
@pytest.mark.parametrize("said", [None, False, True])
@pytest.mark.parametrize("pre, begins", [("llama-bpe", True), ("smollm", False), ("qwen2", False), ("gpt-2", False)])  # fmt: skip
def test_a_begin_token_is_that_of_llama_cpp(pre, begins, said, tmp_path):
    keys = {"tokenizer.ggml.bos_token_id": 1}
    if said is not None:
        keys["tokenizer.ggml.add_bos_token"] = said
    import_(write(tmp_path / "x.gguf", pre=pre, keys=keys), tmp_path / "out")
    own = tokenizer.load(str(tmp_path / "out"))
    assert own.bos == (1 if (begins if said is None else said) else None)
    # A template may name it all the same.
    assert own.template_names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the").input_ids == [1] * (own.bos is not None) + own.encode("the")


def test_every_end_of_a_gguf_file_is_a_stop(tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 3}
    import_(write(tmp_path / "x.gguf", keys=keys), tmp_path / "out")
    # <|endoftext|> and <|im_end|> by their names as well, as in llama.cpp.
    assert tokenizer.load(str(tmp_path / "out")).stops == {0, 1, 2, 3}
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == [0, 1, 2, 3]


def test_keys_that_change_nothing_are_passed_over(tmp_path):
    keys = {
        "llama.rope.dimension_count": H, "llama.attention.value_length": H, "llama.vocab_size": V,
        "llama.expert_count": 0, "llama.rope.scaling.finetuned": True, "general.name": "x",
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    write(tmp_path / "x.gguf", keys=keys)
    assert import_(tmp_path / "x.gguf", tmp_path / "out") == load(read(tmp_path / "out")).model


def test_weights_that_are_not_finite_are_refused(tmp_path):
    content = write(tmp_path / "x.gguf").read_bytes()
    value = theirs().state_dict()["model.norm.weight"].numpy()
    assert content.count(value.tobytes()) == 1
    broken = value.copy()
    broken[3] = np.nan
    (tmp_path / "x.gguf").write_bytes(content.replace(value.tobytes(), broken.tobytes()))
    assert "model.norm.weight has values that are no finite float32" in refusal(tmp_path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", "architecture 'bloom'"),
        (
            b"\x04\0\0\0\0\0\0\0gpt2",
            b"\x04\0\0\0\0\0\0\0bert",
            "its tokenizer is of the kind 'bert'",
        ),
        (b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0unseen", "'unseen' is not one of"),
        (b"GGUF", b"GGML", "it is no GGUF file"),
    ],
)
def test_another_kind_is_refused(old, new, message, tmp_path):
    content = write(tmp_path / "x.gguf").read_bytes()
    assert old in content
    (tmp_path / "x.gguf").write_bytes(content.replace(old, new, 1))
    assert message in refusal(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    content = write(tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: len(content) // 2])
    assert "it is no GGUF file, or truncated" in refusal(tmp_path)


def test_without_the_package_the_error_names_it(tmp_path, monkeypatch):
    write(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'gptjax[gguf]'" in refusal(tmp_path)


def refusal(folder: Path, quantised: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        import_(folder / "x.gguf", folder / "out", quantised)
    assert [p.name for p in folder.iterdir()] == ["x.gguf"]
    assert "\n" not in str(caught.value) and str(folder / "x.gguf") in str(caught.value)
    return str(caught.value)


SMOLLM2 = os.environ.get("GPTJAX_SMOLLM2_GGUF")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="GPTJAX_SMOLLM2_GGUF names no SmolLM2-135M-Instruct")
def test_smollm2_knows_the_capital_of_france(tmp_path):
    import_(str(SMOLLM2), tmp_path / "out")
    found, own = load(read(tmp_path / "out")), tokenizer.load(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 49152
    config = dataclasses.replace(found.model, scan_layers=True)

    @jax.jit
    def following(params, tokens, last):
        x = model.hidden(config, params, tokens).x_BTD
        return model.logits(config, params, x[:, last][:, None])[0, 0].argmax()

    ids = chat.encode(own, [{"role": "user", "content": "What is the capital of France?"}])
    answer: list[int] = []
    while not own.stops & {*answer[-1:]} and len(answer) < 16:
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids) + len(answer)] = ids + answer
        answer.append(int(following(found.params, padded, len(ids) + len(answer) - 1)))
    assert own.decode(answer) == "The capital of France is Paris.<|im_end|>"
