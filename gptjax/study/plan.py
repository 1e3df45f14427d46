"""What a study would run: what it asks, what its arms are, and how much of it is there."""

from __future__ import annotations

from collections.abc import Iterator

from gptjax.storage import Place
from gptjax.study.equalise import EQUAL
from gptjax.study.results import ENDED, Results
from gptjax.study.tables import settings, stated


def lines(results: Results, store: Place) -> Iterator[str]:
    """The plan for a person, of what `results.read` found in `store`."""
    study, measure = results.study, EQUAL[results.study.equal].measure
    begin = f"from {study.begin}" if study.begin else ""
    shared = filter(None, (study.base, settings(study.settings), *study.overrides, begin))
    yield from (f"{study.name}: {study.hypothesis}", *stated(study))
    yield f"Base: {' '.join(shared)}"
    outcomes = [*results.outcomes, *(outcome for outcome, _ in results.tuning)]
    # Where tuning has not chosen, a run that tunes shows what was solved for.
    cell_of = {(o.cell.scale, o.cell.arm): o.cell for o in reversed(outcomes)}
    cells = {(scale, arm): cell_of[scale, arm] for scale in study.scales for arm in study.all_arms}
    names = [", ".join(filter(None, place)) for place in cells]
    for name, (scale, arm) in zip(names, cells, strict=True):
        cell = cells[scale, arm]
        parts = [settings({**study.scales[scale], **study.all_arms[arm]})]
        if cell.solved:
            parts.append(f"solved for: {settings(cell.solved)}")
        if study.equal != "nothing":
            parts.append(f"{measure(cell.config):,.0f} {study.equal}")
        yield f"  {name:<{max(map(len, names))}}  {'; '.join(filter(None, parts))}"
    yield f"{counted(results)}, in {store}"


def counted(results: Results) -> str:
    """How many runs there are, and of what status."""
    study = results.study
    outcomes = [*results.outcomes, *(outcome for outcome, _ in results.tuning)]
    status = {o.cell.address: o.status for o in outcomes}  # arms may share runs
    # What tuning has not chosen yet has no address.
    chosen = {(o.cell.scale, o.cell.arm) for o in results.outcomes}
    arms = len(study.scales) * len(study.all_arms)
    unknown = (arms - len(chosen)) * study.seeds
    ended = sum(s in ENDED for s in status.values())
    without_result = [
        f"{n} {s}" for s in ("diverged", "failed") if (n := [*status.values()].count(s))
    ]
    note = f" ({', '.join(without_result)})" if without_result else ""
    count = len(status) + unknown
    return f"{count} runs: {ended} there, {count - ended} to run{note}"
