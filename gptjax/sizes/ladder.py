"""The runs of a study as the rungs of a ladder of sizes."""

from __future__ import annotations

import numpy as np

from gptjax.config import UserError
from gptjax.progress import say
from gptjax.sizes.scaling import Points
from gptjax.study import equalise
from gptjax.study.results import Results


def points_of(results: Results) -> Points:
    """A point for each arm at each scale, its loss the mean over seeds."""
    study, rows = results.study, []
    if study.metric != "val_loss":
        raise UserError(f"{study.name} decides by {study.metric}: a law of scale is of val_loss")
    for scale in study.scales:
        for arm in study.all_arms:
            runs = [o for o in results.outcomes if (o.cell.scale, o.cell.arm) == (scale, arm)]
            if unfinished := [o for o in runs if o.status != "finished"]:
                say(
                    f"left out, {unfinished[0].status}: {unfinished[0].cell.label} ({unfinished[0].reason})"
                )
                continue
            config = runs[0].cell.config
            loss = float(np.mean([o.metric for o in runs]))
            rows.append((equalise.parameters(config), equalise.tokens(config), loss))
    return Points(*np.array(rows, np.float64).reshape(-1, 3).T)
