"""Pretrained models: read from a folder, brought into one, trained on from.

A pretrained model lies on disk as a Hugging Face folder, whether it came as one, as GGUF or from the
hub; its path or name there is its name, as a model and as `data.tokenizer`. There is no second
format.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from gptjax import hub
from gptjax import model as gpt
from gptjax.config import Config, Model, UserError
from gptjax.interop import gguf, hf, peft
from gptjax.interop.families import RUN_FIELDS, Family, Keys, to_model
from gptjax.places import near
from gptjax.storage import Place, expand, local, on_hub, sha256
from gptjax.tokenizer import FILES, TOKENIZER_FILE


class Folder(NamedTuple):
    """A Hugging Face folder of a family that is ours, its config.json read.

    Attributes:
        name: its path or URL, or its pinned name on the hub.
        path: where it is on this machine; its weights may be lacking there until `weight_files`.
        model: its architecture; the fields of `RUN_FIELDS` have plain values.
        tokenizer: its name as `data.tokenizer`; None where the folder holds none.
        adapter: of a folder of peft's, to which all else but the name is that of its base.
    """

    name: Place
    path: Path
    family: Family
    model: Model
    tokenizer: str | None
    adapter: Adapter | None = None


class Adapter(NamedTuple):
    """What changes a pretrained model.

    Attributes:
        path: of its folder on this machine.
        keys: what its config says.
        base: the pretrained model.
        matrices: those that it adapts, as `train.lora_matrices` names them.
    """

    path: Path
    keys: peft.Adapter
    base: Folder
    matrices: tuple[str, ...]


class Pretrained(NamedTuple):
    """A model that was read.

    Attributes:
        model: as in `Folder`, and so is `tokenizer`.
        params: the tree of `model.init`, float32, sharded where a mesh is set; with an adapter some
            of its matrices are `layers.parameter.Adapted`.
        dtype: of the stored tensors: "float32", "bfloat16" or "float16".
    """

    model: Model
    params: gpt.Params
    tokenizer: str | None
    dtype: str


def find(path: Place) -> Folder | None:
    """As `read`; None where config.json is not theirs, a run's, or nothing is there.

    Raises:
        UserError: as `read`; if config.json is damaged.
    """
    name, folder = _described(path)
    if not (folder / hf.CONFIG).is_file():
        return _adapted(name, folder) if (folder / peft.CONFIG).is_file() else None
    keys = hf.read_config(folder)
    return _folder(name, folder, keys) if "model_type" in keys else None


def read(path: str | Place) -> Folder:
    """What a Hugging Face folder says of itself; no weights are read.

    Raises:
        UserError: if it is no such folder, or of an architecture that is not ours; as `hub.pinned`.
    """
    name, folder = _described(expand(path))
    if not (folder / hf.CONFIG).is_file() and (folder / peft.CONFIG).is_file():
        return _adapted(name, folder)
    return _folder(name, folder, hf.read_config(folder))


def _described(path: Place) -> tuple[Place, Place]:
    """The name of a folder, and where it is with all that describes the model."""
    name = hub.pinned(path)
    if on_hub(name) and not hub.files(name) & {hf.CONFIG, peft.CONFIG}:
        raise UserError(f"{name} holds no {hf.CONFIG}: name a model in the format of transformers")
    return name, hub.fetched(name, (hf.CONFIG, hf.INDEX, peft.CONFIG, *FILES))


def _adapted(name: Place, folder: Place) -> Folder:
    """The base of an adapter, and the adapter."""
    if on_hub(name):
        folder = hub.fetched(name, peft.FILES)
    here = near(folder)
    with hf.about(name):
        keys = peft.read_config(here)
    base = find(expand(keys.base))
    if base is None or base.adapter is not None:
        raise UserError(
            f"{name} adapts {keys.base}, which is no pretrained model here: write where it is into "
            f"its {peft.CONFIG} as base_model_name_or_path"
        )
    with hf.about(name):
        matrices = peft.matrices(here, base.family, base.model)
    return base._replace(name=name, adapter=Adapter(here, keys, base, matrices))


def _folder(name: Place, folder: Place, keys: Keys) -> Folder:
    tokenizer = str(name) if (folder / TOKENIZER_FILE).is_file() else None
    with hf.about(name):
        model = to_model(keys)
    return Folder(name, near(folder), *model, tokenizer)


def weight_files(folder: Folder) -> list[Path]:
    """The files that hold the weights, fetched where they are not here.

    Raises:
        UserError: as `hf.weight_names`, `hub.fetched`.
    """
    if folder.adapter is not None:
        return [*weight_files(folder.adapter.base), folder.adapter.path / peft.WEIGHTS]
    remote = on_hub(folder.name)
    there = hub.files(folder.name) if remote else hf.names_in(folder.path)
    with hf.about(folder.name):
        names = hf.weight_names(folder.path, there)
    hub.fetched(folder.name, names)
    return [folder.path / name for name in names]


def files(folder: Folder) -> dict[str, str]:
    """The sha256 of each file that the model is read from, by its name."""
    described = [folder.path / name for name in (hf.CONFIG, *FILES)]
    if folder.adapter is not None:
        described.append(folder.adapter.path / peft.CONFIG)
    return {
        file.name: sha256(file) for file in [*described, *weight_files(folder)] if file.is_file()
    }


def load(folder: Folder, blocks: bool = False) -> Pretrained:
    """Reads the weights.

    Args:
        blocks: leaves those in `layers.blocks` so, for one device; else they are widened.

    Raises:
        UserError: if a tensor is missing, truncated, misshapen or left over; or if the weights
            are pickles.
    """
    if folder.adapter is not None:
        path, keys, base, _ = folder.adapter
        whole = load(base)
        with hf.about(folder.name):
            params = peft.adapt(path, keys, base.family, base.model, whole.params)
        return whole._replace(params=params)
    with hf.about(folder.name):
        source = _source(folder)
        if blocks and isinstance(source, gguf.Tensors):
            params = gguf.read_params(source, folder.family, folder.model)
        else:
            params = hf.read_params(source, folder.family, folder.model)
    return Pretrained(folder.model, params, folder.tokenizer, source.dtype)


def _source(folder: Folder) -> hf.Source:
    weights = weight_files(folder)
    if weights[0].name == hf.GGUF:
        return gguf.open_(weights[0])
    return hf.Safetensors(weights, folder.family)


def adopt(config: Config, folder: Folder) -> Config:
    """`config` for training on from the model in `folder`: its architecture and tokenizer.

    `RUN_FIELDS` stay the run's; so does a shorter context, but for learned positions, whose
    number is that of the table. Of an adapter, that is what is trained.
    """
    kept = {name: getattr(config.model, name) for name in RUN_FIELDS}
    if folder.model.position != "learned":
        kept["context"] = min(folder.model.context, config.model.context)
    data, train = config.data, config.train
    if folder.tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=folder.tokenizer)
    if folder.adapter is not None:
        train = dataclasses.replace(
            train,
            trainable="qlora" if train.trainable == "qlora" else "lora",
            lora_rank=folder.adapter.keys.rank,
            lora_alpha=folder.adapter.keys.alpha,
            lora_matrices=folder.adapter.matrices,
        )
    model = dataclasses.replace(folder.model, **kept)
    return dataclasses.replace(config, model=model, data=data, train=train)


def import_(source: str | Place, out: str | Path, quantised: bool = False) -> Model:
    """Reads a Hugging Face folder, by path or name, or a .gguf file, and writes it to the folder `out`.

    Every tensor keeps its value and, in a Hugging Face folder, its dtype; those of a GGUF file
    are dequantised to float32. `out` appears when it is whole.

    Args:
        quantised: `out` holds the GGUF file itself.

    Returns:
        The architecture.

    Raises:
        UserError: as `load`; if `out` exists; if what is to stay quantised is no GGUF file.
    """
    place, out = expand(source), local(out)
    if place.suffix == ".gguf":
        return gguf.import_(near(place), out, quantised)
    if quantised:
        raise UserError(f"{source} is no .gguf file, of which alone weights stay quantised")
    folder = read(source)
    if folder.adapter is not None:
        raise UserError(
            f"{folder.name} is an adapter of {folder.adapter.base.name}: `export` merges the two, and "
            "other commands take it as it is"
        )
    with hf.about(folder.name):
        hf.copy(_source(folder), folder.family, folder.model, out, folder.tokenizer)
    return folder.model
