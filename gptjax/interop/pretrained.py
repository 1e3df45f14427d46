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
from gptjax.interop.families import RUN_FIELDS, to_model
from gptjax.tokenizer import TOKENIZER_FILE


class Pretrained(NamedTuple):
    """A model that was read.

    Attributes:
        model: its architecture; the fields of `RUN_FIELDS` have plain values.
        params: the tree of `model.init`, float32, sharded where a mesh is set.
        tokenizer: its name as `data.tokenizer`; None where the folder holds none.
        dtype: of the stored tensors: "float32", "bfloat16" or "float16".
    """

    model: Model
    params: gpt.Params
    tokenizer: str | None
    dtype: str


def load(folder: str | Path) -> Pretrained:
    """Reads a Hugging Face folder.

    Raises:
        UserError: if it is no such folder, or of an architecture that is not ours; if a tensor
            is missing, truncated, misshapen or left over; or if the weights are pickles.
    """
    folder = Path(folder)
    keys = hf.read_config(folder)
    with hf.about(folder):
        family, config = to_model(keys)
        source = hf.Safetensors(folder, family)
        params = hf.read_params(source, family, config)
    named = str(folder) if (folder / TOKENIZER_FILE).is_file() else None
    return Pretrained(config, params, named, source.dtype)


def adopt(config: Config, folder: str | Path) -> Config:
    """`config` for training on from the model in `folder`: its architecture and tokenizer.

    `RUN_FIELDS` stay the run's; so does a shorter context, but for learned positions, whose
    number is that of the table.
    """
    folder = Path(folder)
    keys = hf.read_config(folder)
    with hf.about(folder):
        architecture = to_model(keys)[1]
    run_fields = {name: getattr(config.model, name) for name in RUN_FIELDS}
    if architecture.position != "learned":
        run_fields["context"] = min(architecture.context, config.model.context)
    data = config.data
    if (folder / TOKENIZER_FILE).is_file():
        data = dataclasses.replace(data, tokenizer=str(folder))
    return dataclasses.replace(
        config, model=dataclasses.replace(architecture, **run_fields), data=data
    )


def import_(source: str | Path, out: str | Path) -> Model:
    """Reads a Hugging Face folder or a .gguf file, and writes it to the folder `out`.

    Every tensor keeps its value and, in a Hugging Face folder, its dtype; those of a GGUF file
    are dequantised to float32. `out` appears when it is whole.

    Returns:
        The architecture.

    Raises:
        UserError: as `load`; if `out` exists.
    """
    if Path(source).suffix == ".gguf":
        return gguf.import_(Path(source), Path(out))
    folder = Path(source)
    keys = hf.read_config(folder)
    with hf.about(folder):
        family, config = to_model(keys)
        named = str(folder) if (folder / TOKENIZER_FILE).is_file() else None
        hf.copy(hf.Safetensors(folder, family), family, config, Path(out), named)
    return config
