"""Whole evaluations: a run's model over several texts, with all that a reader needs to audit it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax import model, setup, trained
from gptjax.config import Model, UserError
from gptjax.data.sources import open_source
from gptjax.evaluation.measure import Scored, blocks, joined, score, summary, units
from gptjax.evaluation.texts import Reading, Text, open_text
from gptjax.interop import pretrained
from gptjax.locks import scratch
from gptjax.progress import Progress
from gptjax.tokenizer import Tokenizer
from gptjax.trained import Trained


@dataclass(frozen=True)
class Audit:
    """One model's scores."""

    workdir: str
    step: int
    parameters: int
    model_sha256: str
    numerics: str
    tokenizer: Tokenizer
    scored: dict[str, Scored]  # by the texts' names
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 of each, if it is pretrained


def audit(model: Trained, sets: Mapping[str, str], how: Reading) -> Audit:
    """Scores a model.

    Args:
        model: of its config the section eval is the convention; a mesh is made of it.
        sets: {name: source} of `texts.open_text`; empty: the held-out text of data.sources.

    Raises:
        UserError: on whatever `texts`, `measure.score` or `trained.opened` refuse; on prompts.
    """
    setup.check_names(model.config)
    if not sets and model.config.data.packing == "prompts":
        raise UserError(
            "the run's held-out prompts are no text to score: name one by --set NAME=PATH; what its "
            "answers are worth is val_reward in its metrics.jsonl"
        )
    tokenizer = setup.load_tokenizer(model.config)
    with ExitStack() as stack:
        # Then texts: a mistake in them shows before a model is loaded.
        folder = stack.enter_context(scratch())
        texts = [
            open_text(name, source, tokenizer, folder / str(number), how)
            for number, (name, source) in enumerate(sets.items())
        ]
        for source in model.config.data.sources if not sets else ():
            texts.append(
                Text(source, f"{source} (held out)", open_source(source, tokenizer, "val"))
            )
        config, step, params, _ = stack.enter_context(trained.opened(model))
        total = sum(text.store.num_tokens for text in texts)
        with Progress(f"evaluating {model.folder}", total, transient=True) as progress:
            scored = {
                text.name: score(config, params, text, tokenizer, progress.advance)
                for text in texts
            }
        leaves = jax.tree.leaves(params)
        return Audit(
            str(model.folder),
            step,
            sum(leaf.size for leaf in leaves),
            fingerprint(params),
            numerics(config.model),
            tokenizer,
            scored,
            {} if model.source is None else pretrained.files(model.source),
        )


def numerics(config: Model) -> str:
    """How a model computes: "float32", "bfloat16, products in int8"."""
    return config.dtype + ("" if config.products == "dtype" else f", products in {config.products}")


def fingerprint(params: model.Params) -> str:
    """A sha256 over every parameter's path, shape, dtype and bytes, whatever the mesh.

    Parameters come to the host one at a time.
    """
    digest = hashlib.sha256()
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for path, leaf in sorted(leaves.items()):
        array = np.asarray(
            leaf
            if leaf.is_fully_addressable
            else multihost_utils.process_allgather(leaf, tiled=True)
        )
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def identity(audit: Audit) -> dict[str, Any]:
    """Model, how it computes, tokenizer and convention."""
    convention = next(iter(audit.scored.values())).convention
    return {
        "workdir": audit.workdir,
        **({"files": audit.files} if audit.files else {}),
        "step": audit.step,
        "parameters": audit.parameters,
        "model_sha256": audit.model_sha256,
        "numerics": audit.numerics,
        "tokenizer": audit.tokenizer.name,
        "tokenizer_sha256": audit.tokenizer.fingerprint,
        "convention": asdict(convention),
    }


def record(audit: Audit) -> dict[str, Any]:
    """All of it as JSON holds it; "all" sums the texts where there are several."""
    scores: dict[str, Any] = {}
    for name, scored in audit.scored.items():
        documents, text = scored.documents, scored.text
        scores[name] = {
            "source": text.source,
            "detokenizer": text.detokenizer,
            "text_sha256": scored.text_sha256,
            "store_sha256": text.store.fingerprint,
            **summary(documents, units(documents, functools.partial(blocks, scored))),
            "by_position": scored.by_position,
            "by_domain": {
                domain: summary(documents[which], units(documents[which]))
                for domain, which in scored.domains().items()
            },
        }
    if len(scores) > 1:
        scores["all"] = summary(joined([s.documents for s in audit.scored.values()]), None)
    return {**identity(audit), "scores": scores}
