"""How much a recipe's loss varies between seeds, and what can be seen above it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gptjax.study import statistics
from gptjax.study.results import Results

SEEDS_SHOWN = (3, 5, 10, 20)


def lines(results: Results) -> Iterator[str]:
    """The noise floor and what can be seen above it, for a person."""
    study = results.study
    finished = [o for o in results.outcomes if o.status == "finished"]
    for o in results.outcomes:
        if o.status != "finished":
            yield f"left out, {o.status}: {o.cell.label} ({o.reason})"
    measured = statistics.noise(np.array([o.metric for o in finished]))
    low, high = measured.interval
    yield f"{study.base}: {study.metric} {measured.mean:.4f} {study.unit}, {measured.seeds} seeds"
    yield f"sd between seeds: {measured.sd:.2g} (95%: {low:.2g} to {high:.2g})"
    # As if pairs had nothing in common: how much they have only the arms of a study can tell.
    sd_of_difference, largest_sd = (statistics.difference_sd(sd, 0.0) for sd in (measured.sd, high))
    yield (
        "A study of one arm sees a difference with 80% power at the sd above (at the interval's "
        "upper end), if pairing gains nothing:"
    )
    for seeds in SEEDS_SHOWN:
        smallest, largest = (
            statistics.smallest_effect(seeds, sd) for sd in (sd_of_difference, largest_sd)
        )
        yield f"  {seeds:>3} seeds: from {smallest:.2g} ({largest:.2g})"
    needed, at_most = (
        statistics.seeds_to_see(study.smallest, sd) for sd in (sd_of_difference, largest_sd)
    )
    yield f"  a difference of {study.smallest:g}: {_seeds(needed)} seeds ({_seeds(at_most)})"


def _seeds(count: int | None) -> str:
    return f"more than {statistics.MOST_SEEDS:,}" if count is None else f"{count:,}"
