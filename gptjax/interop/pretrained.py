"""Pretrained models: read from a folder, brought into one, trained on from.

A pretrained model lies on disk as a Hugging Face folder, whether it came as one or as GGUF; its
path is its name, as a model and as `data.tokenizer`. There is no second format.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from gptjax import model as gpt
from gptjax.config import Config, Model
from gptjax.interop import gguf, hf
from gptjax.interop.families import RUN_FIELDS, Family, Keys, to_model
from gptjax.places import near
from gptjax.storage import Place, expand, local
from gptjax.tokenizer import TOKENIZER_FILE


class Folder(NamedTuple):
    """A Hugging Face folder of a family that is ours, its config.json read.

    Attributes:
        model: its architecture; the fields of `RUN_FIELDS` have plain values.
        tokenizer: its name as `data.tokenizer`; None where the folder holds none.
    """

    path: Path
    family: Family
    model: Model
    tokenizer: str | None


class Pretrained(NamedTuple):
    """A model that was read.

    Attributes:
        model: as in `Folder`, and so is `tokenizer`.
        params: the tree of `model.init`, float32, sharded where a mesh is set.
        dtype: of the stored tensors: "float32", "bfloat16" or "float16".
    """

    model: Model
    params: gpt.Params
    tokenizer: str | None
    dtype: str


def find(path: Place) -> Folder | None:
    """As `read`; None where config.json is not theirs, or is not there: a run of ours.

    Raises:
        UserError: as `read`; if config.json is damaged.
    """
    if not (path / hf.CONFIG).is_file():
        return None
    keys = hf.read_config(path)
    return _folder(path, keys) if "model_type" in keys else None


def read(path: str | Place) -> Folder:
    """What a Hugging Face folder says of itself; no weights are read.

    Raises:
        UserError: if it is no such folder, or of an architecture that is not ours.
    """
    folder = expand(path)
    return _folder(folder, hf.read_config(folder))


def _folder(path: Place, keys: Keys) -> Folder:
    tokenizer = str(path) if (path / TOKENIZER_FILE).is_file() else None
    with hf.about(path):
        model = to_model(keys)
    return Folder(near(path), *model, tokenizer)


def load(folder: Folder) -> Pretrained:
    """Reads the weights.

    Raises:
        UserError: if a tensor is missing, truncated, misshapen or left over; or if the weights
            are pickles.
    """
    with hf.about(folder.path):
        source = hf.Safetensors(folder.path, folder.family)
        params = hf.read_params(source, folder.family, folder.model)
    return Pretrained(folder.model, params, folder.tokenizer, source.dtype)


def adopt(config: Config, folder: Folder) -> Config:
    """`config` for training on from the model in `folder`: its architecture and tokenizer.

    `RUN_FIELDS` stay the run's; so does a shorter context, but for learned positions, whose
    number is that of the table.
    """
    kept = {name: getattr(config.model, name) for name in RUN_FIELDS}
    if folder.model.position != "learned":
        kept["context"] = min(folder.model.context, config.model.context)
    data = config.data
    if folder.tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=folder.tokenizer)
    return dataclasses.replace(config, model=dataclasses.replace(folder.model, **kept), data=data)


def import_(source: str | Place, out: str | Path) -> Model:
    """Reads a Hugging Face folder or a .gguf file, and writes it to the folder `out`.

    Every tensor keeps its value and, in a Hugging Face folder, its dtype; those of a GGUF file
    are dequantised to float32. `out` appears when it is whole.

    Returns:
        The architecture.

    Raises:
        UserError: as `load`; if `out` exists.
    """
    place, out = expand(source), local(out)
    if place.suffix == ".gguf":
        return gguf.import_(near(place), out)
    folder = read(source)
    with hf.about(folder.path):
        tensors = hf.Safetensors(folder.path, folder.family)
        hf.copy(tensors, folder.family, folder.model, out, folder.tokenizer)
    return folder.model
