"""What GGUF's blocks cost in perplexity: a model beside copies of it whose matrices went through them.

As llama-quantize does without an importance matrix, the weights of each output are rounded in
blocks of 32, here by the package `gguf`. Vectors, positions and routers stay as they are, and so do
the few matrices whose rows are no multiple of 32. The table that makes the logits is Q8_0 in each
copy: so it is in a llama.cpp file of 4 bits whose width is no multiple of 256. Where it is one, such a
file has Q6_K there, which `gguf` cannot write. Beside the copies stand the knobs that round as well.
Each is compared as `eval --compare` does, with intervals over documents, or stretches of a text.

    python experiments/blocks.py --model=runs/shakespeare --out=runs/blocks

The weights of --model are taken for the originals: they are not to have been rounded before. Copies
stay in --out, as models, and beside them results.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

sys.path.insert(0, str(Path(__file__).parents[1]))

from gptjax import configure, trained
from gptjax.config import Model
from gptjax.evaluation import audit
from gptjax.evaluation.compare import compare
from gptjax.evaluation.texts import Reading, parse_sets
from gptjax.interop import hf, pretrained
from gptjax.layers.blocks import SIZE
from gptjax.layers.parameter import Spec
from gptjax.model import abstract_params
from gptjax.records import strict_json
from gptjax.storage import replace_file

KINDS = ("Q8_0", "Q4_1", "Q4_0")
KNOBS = ("model.products=int8", "model.dtype=bfloat16")
ROLES = ("embedding", "matrix", "residual", "unembedding")


def kind_of(spec: Spec, config: Model, kind: str) -> str:
    """What a parameter goes through in a copy of `kind`."""
    if spec.role not in ROLES or spec.size(spec.fan_in) % SIZE:
        return "F32"
    return "Q8_0" if spec.role == ("embedding" if config.tied else "unembedding") else kind


def rounded(values: np.ndarray, spec: Spec, kind: str) -> tuple[jax.Array, int]:
    """A parameter that went through `kind`, in which each output's weights are a row; its bytes there."""
    order = [spec.dims.index(dim) for dim in spec.stacks + spec.fan_out + spec.fan_in]
    rows, through = values.transpose(order), gguf.GGMLQuantizationType[kind]
    blocks = gguf.quantize(rows.reshape(-1, spec.size(spec.fan_in)), through)
    wide = gguf.dequantize(blocks, through).reshape(rows.shape)
    return jnp.asarray(wide.transpose(np.argsort(order))), blocks.nbytes


def copy(model: trained.Trained, out: Path, kind: str) -> tuple[trained.Trained, float]:
    """A copy in the folder `out`, to be used by the model's own config; its bits a parameter."""
    with trained.opened(model) as (config, _, params, tokenizer):
        specs: dict[str, Spec] = flatten_dict(abstract_params(config.model), sep="/")
        arrays, size = flatten_dict(params, sep="/"), 0
        for path, spec in specs.items():
            through = kind_of(spec, config.model, kind)
            arrays[path], of_it = rounded(np.asarray(arrays[path]), spec, through)
            size += of_it
        bits = 8 * size / sum(array.size for array in arrays.values())
        hf.export(out, config.model, unflatten_dict(arrays, sep="/"), tokenizer.name)
    return trained.Trained(out, model.config, pretrained.read(out)), bits


def measure(
    model: trained.Trained, out: Path, kinds: Sequence[str], sets: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What each kind and each of `KNOBS` costs on the texts of `audit`; also in `out`/results.json.

    Returns:
        kind or knob -> "bits" a parameter (None of a knob, which keeps its parameters), and what
        `compare` says of it beside the model: "a", "b", and of each of the "texts" its figures.
    """
    base = audit.audit(model, sets, Reading())
    results: dict[str, dict[str, Any]] = {}

    def add(name: str, changed: trained.Trained, bits: float | None) -> None:
        record = compare(base, audit.audit(changed, sets, Reading()))
        kept = ("source", "text_sha256", "bytes", "interval_by", "bits_per_byte", "loss")
        texts = {text: {key: t[key] for key in kept} for text, t in record["texts"].items()}
        results[name] = {"bits": bits, "a": record["a"], "b": record["b"], "texts": texts}
        replace_file(out / "results.json", strict_json(results).encode())

    for kind in kinds:
        add(kind, *copy(model, out / kind, kind))
    for knob in KNOBS:
        add(
            knob,
            model._replace(config=configure.override(model.config, [f"--config.{knob}"])),
            None,
        )
    return results


def lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The results as a table."""
    yield "| rounded by | bits a parameter | text | token perplexity | nats/token more (95%) | perplexity more (95%) |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, result in results.items():
        bits = "" if result["bits"] is None else f"{result['bits']:.2f}"
        for text, record in result["texts"].items():
            loss = record["loss"]
            more, low, high = (
                math.nan if nats is None else nats
                for nats in (loss["difference"], *loss["interval"])
            )
            a, b = math.exp(loss["a"]), math.exp(loss["b"])
            yield (
                f"| {name} | {bits} | {text} | {b:.3f}, not {a:.3f} | {more:+.5f} ({low:+.5f} to "
                f"{high:+.5f}) | {math.expm1(more):+.2%} ({math.expm1(low):+.2%} to "
                f"{math.expm1(high):+.2%}) |"
            )
    for text, record in next(iter(results.values()))["texts"].items():
        yield f"{text}: {record['source']}, {record['bytes']:,} bytes; intervals {record['interval_by']}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a run, or a pretrained model")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--set", nargs="+", default=[], help="NAME=PATH, as of `eval`; --config.KNOB=VALUE as there"
    )
    arguments, overrides = parser.parse_known_args(words)
    arguments.out.mkdir(parents=True)
    model = trained.find(arguments.model, overrides=overrides)
    print(
        *lines(measure(model, arguments.out, arguments.kinds, parse_sets(arguments.set))), sep="\n"
    )


if __name__ == "__main__":
    main()
