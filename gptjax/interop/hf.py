"""Hugging Face folders, which are also how a pretrained model lies on our disk.

    FOLDER/config.json            the architecture, see `families`
    FOLDER/*.safetensors          the weights, one file or several under an index
    FOLDER/model.gguf             or a GGUF file, as `import --quantised` leaves it
    FOLDER/tokenizer.json, ...    the tokenizer: FOLDER is its name as `data.tokenizer`

Tensors are read slice by slice into parameters born sharded, one layer of one tensor at a time,
so that a process never holds more than its share and one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, SingleDeviceSharding

from gptjax import model as gpt
from gptjax import sharding, tokenizer
from gptjax.config import ConfigError, Model, UserError, choose
from gptjax.interop.families import Family, Row, to_theirs
from gptjax.interop.tokenizer_files import write_tokenizer
from gptjax.layers.parameter import Spec
from gptjax.progress import say
from gptjax.storage import Place, new_folder

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF = "model.gguf"
# Of safetensors -> of transformers.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Index = tuple[slice, ...]
Tensors = dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]  # name -> shape, maker
CHUNK = 1 << 20  # values read at a time
PLACEHOLDER = {"L": "*", "E": "?"}  # in a `Row`, of the number along a dim


class Source(Protocol):
    """Tensors by Hugging Face's names and shapes, read as needed."""

    shapes: dict[str, tuple[int, ...]]
    dtype: str  # of all tensors, a key of NUMPY; float32 where they differ

    def read(self, name: str, index: Index) -> np.ndarray: ...


def export(
    out: str | Path,
    config: Model,
    params: gpt.Params,
    tokenizer_name: str | None,
    dtype: str = "float32",
) -> None:
    """Writes a folder that `transformers` loads with the same logits.

    Collective: every process calls it, and process 0 writes.

    Args:
        out: the folder, which must not exist; it appears when it is whole.
        config: an architecture of `FAMILIES`.
        params: the tree of `model.init`, on any mesh.
        tokenizer_name: as `data.tokenizer`; None writes none.
        dtype: of the tensors, "float32", "bfloat16" or "float16".

    Raises:
        UserError: if `out` exists, no family can say `config`, or the disk is full.
    """
    tensors = make_tensors(*rows_of(to_theirs(config)[0], config), params)
    choose(NUMPY, dtype, "dtype")
    write = lambda folder: write_safetensors(folder / WEIGHTS, tensors, dtype)  # noqa: E731
    write_folder(Path(out), config, tokenizer_name, dtype, write)


def copy(
    source: Source, family: Family, config: Model, out: Path, tokenizer_name: str | None
) -> None:
    """Writes the tensors of a source as a folder, checked, with one of them in memory at a time.

    Raises:
        UserError: if its tensors are not exactly those of the model; as `export`.
    """
    shapes = check_tensors(source, config, *rows_of(family, config))
    tensors: Tensors = {
        name: (shape, functools.partial(source.read, name, (slice(None),) * len(shape)))
        for name, shape in shapes.items()
    }
    write = lambda folder: write_safetensors(folder / WEIGHTS, tensors, source.dtype)  # noqa: E731
    write_folder(out, config, tokenizer_name, source.dtype, write)


def write_folder(
    out: Path,
    config: Model,
    tokenizer_name: str | None,
    dtype: str,
    write: Callable[[Path], None],
) -> None:
    """A folder whose weights `write` writes into it, on every process."""
    keys = to_theirs(config)[1] | {"torch_dtype": dtype}
    if tokenizer_name is not None:
        vocabulary = tokenizer.load(tokenizer_name)
        stops = sorted(vocabulary.stops)
        keys |= {
            "bos_token_id": vocabulary.bos,
            "eos_token_id": stops[0] if len(stops) == 1 else stops,
        }
    with new_folder(out) as folder:
        if jax.process_index() == 0:
            folder.mkdir(parents=True)
            (folder / CONFIG).write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
            if tokenizer_name is not None:
                write_tokenizer(tokenizer_name, folder)
        write(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {out}")  # now every process sees it


@contextlib.contextmanager
def about(source: Place) -> Iterator[None]:
    """Prefixes errors with the name of the source."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_config(folder: Place) -> dict[str, Any]:
    """The object in a folder's config.json.

    Raises:
        UserError: with the file's path, if it is missing or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder}: it holds no {CONFIG}: name a Hugging Face folder or a .gguf file"
        )
    try:
        tree = json.loads(path.read_bytes())
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged, it is no JSON object: restore it, or fetch it again")
    return tree


# --- reading --------------------------------------------------------------------------------


class Safetensors:
    """A `Source` over .safetensors files, those of `weight_names`."""

    def __init__(self, files: list[Path], family: Family) -> None:
        self._files: dict[str, tuple[Path, str]] = {}  # our name -> file, its name there
        self.shapes: dict[str, tuple[int, ...]] = {}
        dtypes = set()
        folder = files[0].parent
        if unread := _left(folder, files):
            read = _named([file.name for file in files])
            say(f"{folder}: read {read}, not {_named(unread)}")
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    full = name if name == "lm_head.weight" else _prefixed(name, family.prefix)
                    if re.search(family.buffers, full):
                        continue
                    if full in self._files:
                        first, first_name = self._files[full]
                        raise UserError(
                            f"{full} is there twice, as {first_name} in {first.name} and as {name} in "
                            f"{path.name}: fetch the weights again"
                        )
                    part = file.get_slice(name)
                    self._files[full] = (path, name)
                    self.shapes[full] = tuple(part.get_shape())
                    dtypes.add(choose(DTYPES, part.get_dtype(), f"the dtype of {name}"))
        self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"

    def read(self, name: str, index: Index) -> np.ndarray:
        path, file_name = self._files[name]
        # Mapped anew each time, so that no pages of the file stay in memory. (The backend "pread"
        # of safetensors 0.8 reads the whole tensor for a slice of it.)
        with _opened(path) as file:
            return file.get_slice(file_name)[index]


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(prefix) else prefix + name


def weight_names(folder: Path, there: Collection[str]) -> list[str]:
    """The names of the files that hold the weights, sorted, found as `transformers` finds them.

    model.safetensors comes first, else those that its index names, and no others; model.gguf is
    what `import` has left where there is neither.

    Args:
        folder: where the index is, if there is one.
        there: the names of all files, which need not be in `folder` yet.

    Raises:
        UserError: if there are none, or one that is missing; if they are pickles, or an adapter.
    """
    if "adapter_config.json" in there:
        raise UserError(
            "it holds an adapter (adapter_config.json), which would change the weights: merge it "
            "into them, and take it out"
        )
    if WEIGHTS in there:
        return [WEIGHTS]
    if INDEX in there:
        try:
            names = sorted({*json.loads((folder / INDEX).read_bytes())["weight_map"].values()})
            if not names or any(Path(name).name != name for name in names):
                raise ValueError
        except (ValueError, LookupError, AttributeError, TypeError):
            raise UserError(f"{INDEX} is damaged: fetch it again") from None
        if missing := [name for name in names if name not in there]:
            raise UserError(f"{INDEX} names {missing[0]}, which is missing: fetch it again")
        return names
    if GGUF in there:
        return [GGUF]
    if pickles := sorted(name for name in there if _is_pickle(name)):
        raise UserError(
            f"its weights are a pickle ({pickles[0]}), which may run any program when it is "
            "opened: name a version with .safetensors files"
        )
    if unindexed := sorted(name for name in there if name.endswith(".safetensors")):
        raise UserError(
            f"it holds {_named(unindexed)}, but neither {WEIGHTS} nor {INDEX}, by which weights are "
            f"found: fetch the index, or rename a single file to {WEIGHTS}"
        )
    raise UserError("it holds no .safetensors file: name a version that does")


def names_in(folder: Path) -> set[str]:
    """The names of the files in a folder."""
    return {path.name for path in folder.iterdir() if path.is_file()}


def _is_pickle(name: str) -> bool:
    return name.endswith((".bin", ".pt", ".pth"))


def _left(folder: Path, files: list[Path]) -> list[str]:
    """Names in the folder that look like weights and are not read."""
    ends = (".safetensors", ".index.json")
    candidates = {name for name in names_in(folder) if name.endswith(ends) or _is_pickle(name)}
    read = {file.name for file in files}
    return sorted(candidates - read - ({INDEX} if read != {WEIGHTS} else set()))


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise UserError(f"{path.name} is truncated or damaged ({error}): fetch it again") from None


def read_params(source: Source, family: Family, config: Model) -> gpt.Params:
    """The parameters of a source, whose tensors must be exactly those of the model."""
    specs, rows = rows_of(family, config)
    check_tensors(source, config, specs, rows)
    return read_arrays(source, specs, rows)


def read_arrays(source: Source, specs: dict[str, Spec], rows: dict[str, Row]) -> gpt.Params:
    """What the rows say, a tree by the paths of `specs`; the shapes were checked."""
    arrays = {path: _read(source, rows[path], spec) for path, spec in specs.items()}
    return unflatten_dict(arrays, sep="/")


def rows_of(family: Family, config: Model) -> tuple[dict[str, Spec], dict[str, Row]]:
    """The model's parameter at each path, and the family's row for it."""
    specs: dict[str, Spec] = flatten_dict(gpt.abstract_params(config), sep="/")
    return specs, {row.ours: row for row in family.rows if row.ours in specs}


def check_tensors(
    source: Source, config: Model, specs: dict[str, Spec], rows: dict[str, Row]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the model; refuses a source that has any other set."""
    expected, surplus = check_shapes(source, specs, rows)
    if config.tied and "lm_head.weight" in surplus:
        surplus.remove("lm_head.weight")
        every = (slice(None), slice(None))
        head, table = (
            source.read(n, every) for n in ("lm_head.weight", rows["embed/tokens"].theirs)
        )
        if head.shape != table.shape or not (head == table).all():
            raise UserError(
                "lm_head.weight differs from the token table, but tie_word_embeddings is true: "
                "set it to false in config.json"
            )
    refuse_surplus(surplus)
    return expected


def check_shapes(
    source: Source, specs: dict[str, Spec], rows: dict[str, Row]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Name and shape of each tensor that the rows ask for, and the names of the others."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, row in rows.items():
        for _, name in copies(row, specs[path]):
            expected[name] = _their_shape(row, specs[path])
    lacking = [name for name in expected if name not in source.shapes]
    if lacking:
        raise UserError(f"{len(lacking)} tensors are missing, the first of them {lacking[0]}")
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            have = list(source.shapes[name])
            raise UserError(f"{name} is of shape {have}, where the config asks for {list(shape)}")
    return expected, [name for name in source.shapes if name not in expected]


def refuse_surplus(names: list[str]) -> None:
    if names:
        raise UserError(
            f"{len(names)} tensors are no part of the model, the first of them {names[0]}"
        )


def copies(row: Row, spec: Spec) -> Iterator[tuple[tuple[int, ...], str]]:
    """Where each of their tensors stands in the stacks of a parameter, layer and expert; its name."""
    for index in np.ndindex(spec.shape[: len(spec.stacks)]):
        name = row.theirs
        for letter, number in zip(spec.stacks, index, strict=True):
            name = name.replace(PLACEHOLDER[letter], str(number))
        yield index, name


def _of_one(spec: Spec) -> Spec:
    """The same parameter without the first of its stacks."""
    return dataclasses.replace(
        spec, shape=spec.shape[1:], dims=spec.dims[1:], stacks=spec.stacks[1:]
    )


def _sizes(spec: Spec) -> dict[str, int]:
    return dict(zip(spec.dims, spec.shape, strict=True))


def _their_shape(row: Row, spec: Spec) -> tuple[int, ...]:
    sizes = _sizes(spec)
    shape = [math.prod(sizes[letter] for letter in group) for group in row.layout.split()]
    shape[-1] *= row.part[1]
    return tuple(shape)


def _read(source: Source, row: Row, spec: Spec) -> jax.Array:
    """A parameter, each device's shard from only the bytes that it needs."""
    name = row.theirs
    if not spec.dims.startswith("L"):
        return _place(spec, functools.partial(_shard, source, name, row, spec))
    layers, one = spec.shape[0], _of_one(spec)
    stacked = jnp.zeros(spec.shape, jnp.float32, device=_sharding(spec))
    for layer in range(layers):
        name = row.theirs.replace(PLACEHOLDER["L"], str(layer))
        part = _place(one, functools.partial(_shard, source, name, row, one))
        # Waited for, so that no more than one layer is on its way.
        stacked = jax.block_until_ready(_put(stacked, part, layer))
    return stacked


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, part, layer, 0)


def _sharding(spec: Spec) -> jax.sharding.Sharding:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    placed = NamedSharding(mesh, sharding.parameter_spec(spec.dims))
    for dim, size, axes in zip(spec.dims, spec.shape, placed.spec, strict=True):
        ways = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % ways:
            raise ConfigError(
                f"the model's {dim}={size} does not divide over mesh axes {axes} = {ways}: "
                "choose another mesh"
            )
    return placed


def _place(spec: Spec, load: Callable[[Index | None], np.ndarray]) -> jax.Array:
    return jax.make_array_from_callback(spec.shape, _sharding(spec), load)


def _shard(source: Source, name: str, row: Row, spec: Spec, index: Index | None) -> np.ndarray:
    """Our slice `index` of their tensor, float32: the letters of a group but its first are whole.

    Of a parameter of experts, that of several tensors.
    """
    if spec.stacks:
        here = slice(None) if index is None else index[0]
        rest, letter = None if index is None else index[1:], spec.stacks[0]
        names = (
            name.replace(PLACEHOLDER[letter], str(i)) for i in range(*here.indices(spec.shape[0]))
        )
        return np.stack([_shard(source, n, row, _of_one(spec), rest) for n in names])
    sizes, groups = _sizes(spec), row.layout.split()
    index = (slice(None),) * len(spec.shape) if index is None else index
    ranges = {dim: part.indices(sizes[dim])[:2] for dim, part in zip(spec.dims, index, strict=True)}
    inner = [math.prod(sizes[letter] for letter in group[1:]) for group in groups]
    offset = [0] * (len(groups) - 1) + [row.part[0] * inner[-1] * sizes[groups[-1][0]]]

    def their_slice(group: int, start: int, stop: int) -> slice:
        return slice(start * inner[group] + offset[group], stop * inner[group] + offset[group])

    letters = "".join(groups)
    shard = np.empty([ranges[dim][1] - ranges[dim][0] for dim in spec.dims], np.float32)
    in_their_order = shard.transpose([spec.dims.index(dim) for dim in letters])
    trailing = [their_slice(i, *ranges[group[0]]) for i, group in enumerate(groups)][1:]
    first, last = ranges[letters[0]]
    # A few rows at a time, so that no second copy of a large tensor is made on the way.
    step = max(1, CHUNK * (last - first) // max(1, shard.size))
    for start in range(first, last, step):
        stop = min(start + step, last)
        part = in_their_order[start - first : stop - first]
        part[...] = source.read(name, (their_slice(0, start, stop), *trailing)).reshape(part.shape)
    return shard


# --- writing --------------------------------------------------------------------------------


def make_tensors(specs: dict[str, Spec], rows: dict[str, Row], params: gpt.Params) -> Tensors:
    """Every tensor of the rows, in the order of the layers."""
    arrays = flatten_dict(params, sep="/")
    names: dict[str, tuple[tuple[int, ...], list[Row]]] = {}
    each = [(*copy, row) for row in rows.values() for copy in copies(row, specs[row.ours])]
    for index, name, row in sorted(each, key=lambda copy: copy[0][:1] or (0,)):
        names.setdefault(name, (index, []))[1].append(row)

    def make(index: tuple[int, ...], parts: list[Row]) -> np.ndarray:
        blocks = [_theirs(arrays[r.ours], r, specs[r.ours], index) for r in parts]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-1)

    return {
        name: (_their_shape(parts[0], specs[parts[0].ours]), functools.partial(make, index, parts))
        for name, (index, parts) in names.items()
    }


def _theirs(array: jax.Array, row: Row, spec: Spec, index: tuple[int, ...]) -> np.ndarray:
    dims = spec.dims[len(index) :]
    where = None if sharding.out(dims) is None else sharding.parameter_spec(dims)
    array = array.at[index].get(out_sharding=where)
    groups, sizes = row.layout.split(), _sizes(spec)
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    values = np.asarray(array)
    values = values.transpose([dims.index(dim) for dim in "".join(groups)])
    return values.reshape([math.prod(sizes[letter] for letter in group) for group in groups])


def write_safetensors(path: Path, tensors: Tensors, dtype: str) -> None:
    """One file, a tensor at a time (safetensors' own writer wants all of them in memory)."""
    kind = next(code for code, name in DTYPES.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, _) in tensors.items():
        size = math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    writes = jax.process_index() == 0
    with path.open("wb") if writes else contextlib.nullcontext() as file:
        if file is not None:
            file.write(struct.pack("<Q", len(text)) + text)
        for name, (_, make) in tensors.items():
            array = make()
            # Rows at a time: cast, and laid out, in a copy of them alone.
            step = max(1, CHUNK * len(array) // array.size)
            for start in range(0, len(array), step):
                with np.errstate(over="ignore"):  # refused below
                    rows = np.ascontiguousarray(array[start : start + step], NUMPY[dtype])
                if not np.isfinite(rows).all():
                    refuse_not_finite(name, array[start : start + step], dtype)
                if file is not None:
                    file.write(rows.view(np.uint8).data)  # bfloat16 has no buffer of its own


def refuse_not_finite(name: str, values: np.ndarray, dtype: str) -> NoReturn:
    """On every process alike, so that none waits for another."""
    remedy = "fetch the model again, or take an earlier checkpoint"
    if np.isfinite(values).all():
        remedy = "choose another dtype"
    raise UserError(f"{name} has values that are no finite {dtype}: {remedy}")
