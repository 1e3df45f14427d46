"""Adapters in the layout of Hugging Face's peft.

    FOLDER/adapter_config.json           rank, alpha, and the name of the base
    FOLDER/adapter_model.safetensors     A and B of each adapted module, of each layer

GPT-2 has query, key and value in one module, `c_attn`, of which peft makes one adapter. Three of
ours are one of theirs of three times the rank: A of one above the other, B along the diagonal. One
of theirs is three of ours with the same A.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from scipy.linalg import block_diag

from gptjax import model as gpt
from gptjax import sharding
from gptjax.config import Model, UserError
from gptjax.interop import hf
from gptjax.interop.families import Family, Row, to_theirs
from gptjax.layers.linear import is_adapted
from gptjax.layers.parameter import Adapted, Spec
from gptjax.storage import new_folder
from gptjax.trainable import adapter_specs, merged

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, WEIGHTS)
PREFIX = "base_model.model."  # of a module's name
# By how much merging may move logits: root mean square, over that of the logits. In float32 it moves
# the last digits.
MERGED = 1e-5

# Keys that leave the logits as they are, or that the tensors say themselves.
HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode peft_type peft_version task_type
    target_modules exclude_modules r lora_alpha lora_dropout rank_pattern alpha_pattern
    fan_in_fan_out megatron_core qalora_group_size layers_pattern ensure_weight_tying
    init_lora_weights
""".split()  # noqa: SIM905
)
# How A and B may have begun; other ways change the base as well.
INITS = (True, False, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """What an adapter's folder says of itself.

    Attributes:
        base: the name of the pretrained model that it adapts: hf:ORG/NAME[@REVISION], or a path.
        rank: of each adapter.
        alpha: the product of A and B is multiplied by alpha / rank.
        fused: (rank, alpha) of what is several matrices of ours; None: as the others.
    """

    base: str
    rank: int
    alpha: float
    fused: tuple[int, float] | None


def read_config(folder: Path) -> Adapter:
    """
    Raises:
        UserError: if it is damaged, or says what we do not compute.
    """
    try:
        keys = json.loads((folder / CONFIG).read_bytes())
        if keys["peft_type"] != "LORA":
            raise UserError(f"peft_type={keys['peft_type']!r} is not LORA")
        rank, alpha = int(keys["r"]), float(keys["lora_alpha"])
        base, revision = keys["base_model_name_or_path"], keys.get("revision")
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{CONFIG} is damaged: restore it, or fetch it again") from None
    off: tuple[Any, ...] = (None, False, "none", {}, [], 0)
    unknown = [key for key, value in keys.items() if key not in HARMLESS and value not in off]
    if keys.get("init_lora_weights", True) not in INITS:
        unknown.append("init_lora_weights")
    if unknown:
        raise UserError(f"an adapter with {', '.join(sorted(unknown))} is not supported")
    if not base:
        raise UserError(f"{CONFIG} names no base_model_name_or_path: write the model's there")
    ranks, alphas = (keys.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    fused = None
    if ranks or alphas:
        if ranks.keys() != {"c_attn"} or alphas.keys() != {"c_attn"}:
            raise UserError("an adapter with ranks or alphas of each module is not supported")
        fused = int(ranks["c_attn"]), float(alphas["c_attn"])
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not Path(base).exists():
        base = f"hf:{base}" + (f"@{revision}" if revision else "")
    return Adapter(base, rank, alpha, fused)


def matrices(folder: Path, family: Family, config: Model) -> tuple[str, ...]:
    """The matrices that an adapter has factors of, as `train.lora_matrices` names them."""
    there = _source(folder, family).shapes
    _, rows = hf.rows_of(family, config)
    return tuple(
        path.removeprefix("blocks/")
        for path, row in rows.items()
        if path.startswith("blocks/") and f"{_module(row)}.lora_A.weight".replace("*", "0") in there
    )


def adapt(
    folder: Path, adapter: Adapter, family: Family, config: Model, params: gpt.Params
) -> gpt.Params:
    """`params` with the adapter of a folder.

    Raises:
        UserError: if a tensor is missing, truncated, misshapen or left over.
    """
    paths = [f"blocks/{name}" for name in matrices(folder, family, config)]
    specs, rows = _declared(paths, family, config, adapter.rank)
    source = _Apart(_source(folder, family), rows, adapter)
    hf.refuse_surplus(hf.check_shapes(source, specs, rows)[1])
    factors = flatten_dict(hf.read_arrays(source, specs, rows), sep="/")
    leaves = flatten_dict(params, sep="/")
    for path in paths:
        a, b = factors[f"{path}/a"], factors[f"{path}/b"]
        leaves[path] = Adapted(leaves[path], a, b, scale=adapter.alpha / adapter.rank)
    return unflatten_dict(leaves, sep="/")


def export(
    out: Path, config: Model, params: gpt.Params, base: str, dropout: float, dtype: str = "float32"
) -> None:
    """Writes the adapters of a model as a folder that peft opens with the same logits.

    Collective: every process calls it, and process 0 writes.

    Args:
        out: the folder, which must not exist; it appears when it is whole.
        config: an architecture of `families.FAMILIES`.
        params: with adapters.
        base: the name of the pretrained model that they adapt.
        dropout: of the training, which peft would go on with.
        dtype: of the tensors.

    Raises:
        UserError: if there are no adapters, or some that peft has no place for; as `hf.export`.
    """
    family = to_theirs(config)[0]
    adapted = {
        path: leaf for path, leaf in flatten_dict(params, sep="/").items() if is_adapted(leaf)
    }
    if not adapted:
        raise UserError("the model has no adapters: export it whole")
    one = next(iter(adapted.values()))
    rank = one.a.shape[-1]
    specs, rows = _declared(list(adapted), family, config, rank)
    factors = {f"{path}/{name}": getattr(x, name) for path, x in adapted.items() for name in "ab"}
    tensors = hf.make_tensors(specs, rows, unflatten_dict(factors, sep="/"))
    fused = _fused(rows)
    for name, parts in fused.items():
        for layer in range(config.layers):
            popped = [tensors.pop(part.replace("*", str(layer))) for part in parts]
            tensors[name.replace("*", str(layer))] = _joined(name, popped)
    name, _, revision = base.removeprefix("hf:").partition("@")
    alpha = round(one.scale * rank, 6)
    alpha = int(alpha) if alpha == int(alpha) else alpha
    keys = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name if base.startswith("hf:") else base,
        "revision": revision or None if base.startswith("hf:") else None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {"c_attn": 3 * rank} if fused else {},
        "alpha_pattern": {"c_attn": 3 * alpha} if fused else {},
        "target_modules": _targets(family, rows),
        "fan_in_fan_out": family.prefix == "transformer.",  # GPT-2's kernels lie the other way
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(out) as folder:
        if jax.process_index() == 0:
            folder.mkdir(parents=True)
            (folder / CONFIG).write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
        hf.write_safetensors(folder / WEIGHTS, tensors, dtype)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {out}")  # now every process sees it


def merge(config: Model, params: gpt.Params) -> tuple[gpt.Params, float]:
    """The model's tree with its adapters merged, and by how much that moves logits: the root mean square
    of the differences over that of the logits, of a row of at most 64 random tokens, in float32.

    Raises:
        UserError: if that is more than `MERGED`.
    """
    exact = dataclasses.replace(config, dtype="float32", products="dtype", attention="plain")
    whole = merged(config, params)
    row_T = np.random.default_rng(0).integers(config.vocab_size, size=min(config.context, 64))
    tokens_BT = sharding.shard(jnp.tile(row_T.astype(np.int32), (sharding.ways("B"), 1)), "BT")
    logits = jax.jit(functools.partial(gpt.apply, exact))
    rms = lambda x: jnp.sqrt(jnp.square(x).mean())  # noqa: E731
    apart_BTV, merged_BTV = logits(params, tokens_BT), logits(whole, tokens_BT)
    moved = float(rms(apart_BTV - merged_BTV) / rms(apart_BTV))
    if not moved <= MERGED:
        raise UserError(
            f"merging the adapters would move logits by {moved:.1e} of their size, which is more than "
            f"{MERGED}: export them by --adapter"
        )
    return whole, moved


def _source(folder: Path, family: Family) -> hf.Safetensors:
    if not (folder / WEIGHTS).is_file():
        pickle = f": {PICKLE} is a pickle, which may run any program" * (folder / PICKLE).is_file()
        raise UserError(f"it holds no {WEIGHTS}{pickle}: name a version that does")
    return hf.Safetensors([folder / WEIGHTS], family._replace(prefix="", buffers="$^"))


def _module(row: Row) -> str:
    return PREFIX + row.theirs.removesuffix(".weight")


def _declared(
    paths: list[str], family: Family, config: Model, rank: int
) -> tuple[dict[str, Spec], dict[str, Row]]:
    """Specs and rows of both factors of each matrix; of a part of a module, with its number."""
    model_specs, model_rows = hf.rows_of(family, config)
    if unsaid := [p for p in paths if p not in model_rows or "?" in model_rows[p].theirs]:
        raise UserError(
            f"peft has no place for adapters of {', '.join(unsaid)}: name others by "
            "train.lora_matrices, or export the model whole"
        )
    specs: dict[str, Spec] = {}
    rows: dict[str, Row] = {}
    for path in paths:
        spec, row = model_specs[path], model_rows[path]
        number = f".{row.part[0]}" if row.part[1] > 1 else ""
        layouts = f"R {spec.fan_in}", f"{spec.fan_out} R"
        for name, factor, layout in zip("ab", adapter_specs(spec, rank), layouts, strict=True):
            theirs = f"{_module(row)}.lora_{name.upper()}.weight{number}"
            specs[f"{path}/{name}"] = factor
            rows[f"{path}/{name}"] = Row(f"{path}/{name}", theirs, layout)
    for whole, parts in _fused(rows).items():
        if len(parts) != 3:
            raise UserError(
                f"{whole.split('.lora_')[0]} is query, key and value in one: name all three by "
                "train.lora_matrices, or none"
            )
    return specs, rows


def _fused(rows: dict[str, Row]) -> dict[str, list[str]]:
    """Their tensors that are several of ours, each with the names that these have here, in order."""
    fused: dict[str, list[str]] = {}
    for row in rows.values():
        whole, _, number = row.theirs.rpartition(".")
        if number.isdigit():
            fused.setdefault(whole, []).append(row.theirs)
    return {whole: sorted(parts) for whole, parts in fused.items()}


def _joined(name: str, parts: list[Any]) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
    """Shape and maker of one tensor of theirs: A of one above the other, B along the diagonal."""
    shapes, makers = zip(*parts, strict=True)
    rows, columns = (sum(shape[i] for shape in shapes) for i in (0, 1))
    if ".lora_A." in name:
        return (rows, shapes[0][1]), lambda: np.concatenate([make() for make in makers])
    return (rows, columns), lambda: block_diag(*(make() for make in makers))


class _Apart:
    """A `hf.Source` in which what is one tensor of theirs and several of ours is several."""

    def __init__(self, source: hf.Source, rows: dict[str, Row], adapter: Adapter) -> None:
        self._source, self.dtype = source, source.dtype
        self._parts: dict[str, tuple[str, hf.Index]] = {}
        self.shapes = dict(source.shapes)
        fused, rank = _fused(rows), adapter.rank
        if fused and adapter.fused not in (None, (3 * rank, 3 * adapter.alpha)):
            raise UserError(
                f"rank and alpha of c_attn must be those of the others, {rank}, or thrice"
            )
        for whole in source.shapes:
            names = fused.get(re.sub(r"\.\d+\.", ".*.", whole, count=1), [])
            for i, name in enumerate(names):
                height, width = (n // len(names) for n in source.shapes[whole])
                here, every = slice(i * height, (i + 1) * height), slice(None)
                index: hf.Index = (every, every)
                if ".lora_B." in whole:
                    index = (here, every)
                if adapter.fused is not None:
                    block = slice(i * width, (i + 1) * width)
                    index = (here, block) if ".lora_B." in whole else (here, every)
                part = re.sub(r"\.\*\.", f".{_number(whole)}.", name, count=1)
                self._parts[part] = whole, index
                self.shapes[part] = source.read(whole, index).shape
            if names:
                del self.shapes[whole]
            if names and adapter.fused is not None and ".lora_B." in whole:
                values = source.read(whole, (slice(None), slice(None)))
                blocks = [source.read(*self._parts[p]) for p in self._parts if p.startswith(whole)]
                if (values != block_diag(*blocks)).any():
                    raise UserError(f"{whole} is of thrice the rank, but not along the diagonal")

    def read(self, name: str, index: hf.Index) -> np.ndarray:
        if name not in self._parts:
            return self._source.read(name, index)
        return self._source.read(*self._parts[name])[index]


def _number(name: str) -> str:
    """Of a tensor's layer."""
    match = re.search(r"\.(\d+)\.", name)
    assert match is not None
    return match[1]


def _targets(family: Family, rows: dict[str, Row]) -> list[str]:
    """Modules by the last part of their names, or the last two where that is not enough."""
    modules = {row.theirs.removesuffix(".weight") for row in family.rows if ".*." in row.theirs}
    ends = Counter(module.split(".")[-1] for module in modules)
    adapted = (row.theirs.split(".lora_")[0].split(".")[-2:] for row in rows.values())
    return sorted({last if ends[last] == 1 else f"{before}.{last}" for before, last in adapted})
