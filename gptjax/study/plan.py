"""What a study would run: what it asks, what its arms are, and how much of it is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gptjax.study.equalise import EQUAL
from gptjax.study.results import ENDED, Results
from gptjax.study.tables import settings, stated


def lines(found: Results, store: Path) -> Iterator[str]:
    """The plan for a person, of what `results.read` found in `store`."""
    asked, measure = found.study, EQUAL[found.study.equal].measure
    shared = filter(None, (asked.base, settings(asked.settings), *asked.overrides))
    yield from (f"{asked.name}: {asked.hypothesis}", *stated(asked))
    yield f"Base: {' '.join(shared)}"
    every = [*found.outcomes, *(outcome for outcome, _ in found.tuning)]
    # Where tuning has not chosen, a run that tunes shows what was solved for.
    known = {(o.cell.scale, o.cell.arm): o.cell for o in reversed(every)}
    cells = {(scale, arm): known[scale, arm] for scale in asked.scales for arm in asked.all_arms}
    names = [", ".join(filter(None, place)) for place in cells]
    for name, (scale, arm) in zip(names, cells, strict=True):
        cell = cells[scale, arm]
        parts = [settings({**asked.scales[scale], **asked.all_arms[arm]})]
        if cell.solved:
            parts.append(f"solved for: {settings(cell.solved)}")
        if asked.equal != "nothing":
            parts.append(f"{measure(cell.config):,.0f} {asked.equal}")
        yield f"  {name:<{max(map(len, names))}}  {'; '.join(filter(None, parts))}"
    yield f"{counted(found)}, in {store}"


def counted(found: Results) -> str:
    """How many runs there are, and of what status."""
    asked = found.study
    every = [*found.outcomes, *(outcome for outcome, _ in found.tuning)]
    status = {o.cell.address: o.status for o in every}  # arms may share runs
    # What tuning has not chosen yet has no address.
    chosen = {(o.cell.scale, o.cell.arm) for o in found.outcomes}
    arms = len(asked.scales) * len(asked.all_arms)
    unknown = (arms - len(chosen)) * asked.seeds
    ended = sum(s in ENDED for s in status.values())
    lost = [f"{n} {s}" for s in ("diverged", "failed") if (n := [*status.values()].count(s))]
    told = f" ({', '.join(lost)})" if lost else ""
    count = len(status) + unknown
    return f"{count} runs: {ended} there, {count - ended} to run{told}"
