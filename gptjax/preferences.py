"""Pairs of texts beside the step: what the reference says of them, and how held-out ones fare.

The reference is the model that training began with. It scores each text once, before the first
step, and is needed no more: its log-likelihoods lie in the run's folder,

    WORKDIR/reference.npz    for each source and split, float32: each target's negative
                             log-likelihood, row by row (`Pairs.reference`)

Each checkpoint says the sha256 of that file, so that a run goes on with this reference alone. The
cache keeps it as well, for other runs that begin with the same model, pairs and program.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

from gptjax import model, records, sharding
from gptjax.config import Config, UserError, choose
from gptjax.data.batches import Batch, Pairs
from gptjax.data.store import Store
from gptjax.objectives import OBJECTIVE
from gptjax.perplexity import RowEvaluator, batch_nll
from gptjax.places import kept
from gptjax.storage import Place, disk, replace_file
from gptjax.tokenizer import Tokenizer

REFERENCE = "reference.npz"


@dataclasses.dataclass(frozen=True)
class Means:
    """Sums over held-out rows, which add up over sources, by the names of their means.

    Attributes:
        rows: so many.
        kind: what they are, in the plural.
    """

    sums: Mapping[str, float]
    rows: float
    kind: str

    def __add__(self, other: Self) -> Self:
        sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        return dataclasses.replace(self, sums=sums, rows=self.rows + other.rows)

    @property
    def loss(self) -> float:
        return self.values["loss"]

    @property
    def values(self) -> dict[str, float]:
        return {name: total / self.rows for name, total in self.sums.items()}

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value:z.4f}" for name, value in self.values.items())
        return f"{told} ({self.rows:,.0f} {self.kind})"


class PairEvaluator(RowEvaluator):
    """Scores the pairs of one store by the objective, on the current mesh.

    Args:
        config: the sections model, optim and train, and eval.batch_size; settled.
        store: of pairs.
        tokenizer: the store's.
    """

    rows: Pairs

    def __init__(self, config: Config, store: Store, tokenizer: Tokenizer) -> None:
        super().__init__(config, store, tokenizer)
        self._config = dataclasses.replace(config, seed=0)

    def __call__(
        self, params: model.Params, advance: Callable[[int], None] = lambda tokens: None
    ) -> Any:
        """The `Means` of all pairs, of a step's metrics; `advance` hears of every so many places scored."""
        scores = []
        for first in range(0, self._count, self._at_once):
            metrics, weight = jax.device_get(self.program(params, self.batch(first)))
            sums = {name: float(value) for name, value in metrics.items()}
            scores.append(Means(sums, float(weight), "pairs"))
            advance(min(self._at_once, self._count - first) * self.rows.context)
        return sum(scores[1:], start=scores[0])

    def program(self, params: model.Params, batch: Batch[jax.Array]) -> Any:
        """What is computed of a batch: sums of the objective's metrics, and their weight."""
        return _score(self._config, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: Config, params: model.Params, batch: Batch[jax.Array]
) -> tuple[dict[str, jax.Array], jax.Array]:
    objective = choose(OBJECTIVE, config.train.objective, "train.objective")
    totals = objective.totals(config, params, batch, None)
    return totals.metrics, totals.weight


def reference(
    config: Config,
    params: model.Params,
    sources: Mapping[str, Pairs],
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Each target's negative log-likelihood under `params`, for each source as `Pairs.reference`.

    It takes as many rows at once as a micro-batch has: of a row in another shape of program the
    last bits may differ, and the first loss is ln 2 the better the more they agree.
    """
    rows = _at_once(config)
    values = {}
    for name, pairs in sources.items():
        parts = []
        for first in range(0, len(pairs), rows):
            index = np.arange(first, first + rows)
            # Those beyond the last are the last again.
            batch = pairs.rows(np.minimum(index, len(pairs) - 1))
            placed = sharding.place(functools.partial(_part, batch), rows, "BT")
            nll_BT = batch_nll(config.model, config.optim.loss_vocab_chunk, params, placed)
            assert batch.segments is not None
            real_BT = (batch.segments >= 0) & (index < len(pairs))[:, None]
            parts.append(np.asarray(nll_BT)[real_BT])
            advance(len(parts[-1]))
        values[name] = np.concatenate(parts)
    return values


def cached_reference(
    config: Config,
    params: model.Params,
    sources: Mapping[str, Pairs],
    begun: Mapping[str, Any],
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """`reference`, from the cache where a run alike has scored: the same bits.

    Several processes, which need not share a cache, always score.

    Args:
        begun: the fingerprints of data and tokenizer, and what tells the model that training began with.
    """
    if jax.process_count() > 1:
        return reference(config, params, sources, advance)
    made_of = {
        "begun": begun,
        "code": records.code_fingerprint(),
        "machine": records.environment() | {"command": None},
        "model": dataclasses.asdict(config.model),
        "params": str(jax.tree.map(jax.typeof, params)),  # adapters, and what is rounded
        "loss_vocab_chunk": config.optim.loss_vocab_chunk,
        "rows": _at_once(config),
    }
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return _unpacked(kept(name, lambda: _packed(reference(config, params, sources, advance))))


def _at_once(config: Config) -> int:
    return config.data.batch_size // config.train.accumulation


def _packed(values: Mapping[str, np.ndarray]) -> bytes:
    with io.BytesIO() as buffer:
        np.savez(buffer, **dict(values))  # type: ignore[arg-type]
        return buffer.getvalue()


def _unpacked(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as values:
        return dict(values)


def _part(batch: Batch[np.ndarray], start: int, stop: int) -> Batch[np.ndarray]:
    return jax.tree.map(lambda x: x[start:stop], batch)


def write(workdir: Place, values: Mapping[str, np.ndarray]) -> str:
    """Writes them into the run's folder; returns the file's sha256."""
    content = _packed(values)
    if jax.process_index() == 0:
        with disk(workdir):
            replace_file(workdir / REFERENCE, content)
    return hashlib.sha256(content).hexdigest()


def read(workdir: Place, sha256: str) -> dict[str, np.ndarray]:
    """What `write` wrote.

    Raises:
        UserError: if it is not there, or another.
    """
    file = workdir / REFERENCE
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{file} is not what the run wrote: restore it, or begin anew in another --workdir"
        )
    return _unpacked(content)
