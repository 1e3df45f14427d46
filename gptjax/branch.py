"""Runs that begin with the state of another: branches of its checkpoints.

`train.branch` is RUN@STEP#SHA256: the trunk's folder, one of its checkpoints, and the first digits
of the sha256 of that checkpoint's manifest, which `resolve` fills in. So a config says with which
bytes its run began, and a store of cells keeps branches of different trunks apart.

The whole TrainState is taken over and the count of steps goes on: step STEP + 1 reads batch STEP,
and the schedule stands where its own formula is after so many updates. Without any other change
the run is the trunk going on, bit for bit. Batches are a function of (seed, step) and the section
data: with other data, rows or seed they are those of a run that had these from its beginning.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from gptjax import state
from gptjax.checkpoint import CHECKPOINTS, Checkpoints
from gptjax.config import Config, ConfigError, UserError, flatten, recorded, to_dict
from gptjax.progress import say
from gptjax.records import by_place, meant, read_environment
from gptjax.storage import Place, expand, whole

LATEST = "latest"
DIGITS = 16  # of the sha256
# Knobs that decide which rows a step reads.
ROWS = ("seed", "model.context", "data.")


class Branch(NamedTuple):
    """What a resolved `train.branch` says."""

    run: Place
    step: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.run}@{self.step}#{self.sha256}"


def of(config: Config) -> Branch | None:
    """Where a run begins; None at random parameters.

    Raises:
        ConfigError: if `train.branch` is not resolved, or no step is left after it.
    """
    if (text := config.train.branch) is None:
        return None
    match = re.fullmatch(rf"(.+)@(\d+)#([0-9a-f]{{{DIGITS}}})", text)
    if not match:
        raise ConfigError(
            f"train.branch={text!r} does not say which bytes are meant: write RUN@STEP by `train "
            "--branch` or in a study, or call gptjax.branch.resolve"
        )
    branch = Branch(expand(match[1]), int(match[2]), match[3])
    if branch.step >= config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} leaves nothing to train after step {branch.step} of "
            f"{branch.run}: set it to more"
        )
    return branch


def first_step(config: Config) -> int:
    """How many steps were done before a run's own."""
    branch = of(config)
    return 0 if branch is None else branch.step


def resolve(config: Config) -> Config:
    """`config` with the step and the digest of `train.branch`, where it lacks them.

    RUN and RUN@latest are RUN's latest checkpoint.

    Raises:
        UserError: if there is no such checkpoint.
    """
    text = config.train.branch
    if text is None or re.search(rf"@\d+#[0-9a-f]{{{DIGITS}}}$", text):
        return config
    return _with(config, _find(*_parse(text))[0])


def of_run(text: str, workdir: Place) -> Config:
    """The config of a branch of RUN@STEP: that with which the run saved it.

    A branch that was begun in `workdir` goes on from its own records, whatever became of its
    trunk; there "latest" is the step that it was then.

    Raises:
        UserError: if there is no such checkpoint.
    """
    run, step = _parse(text)
    for record in reversed(read_environment(workdir)):
        lineage = record.get("branch")
        if lineage and whole(lineage["folder"]) == whole(run) and step in (None, lineage["step"]):
            branch = Branch(run, lineage["step"], lineage["manifest_sha256"][:DIGITS])
            tree = lineage["config"]
            break
    else:
        branch, tree = _find(run, step)
    return _with(recorded(tree), branch)


def begin(
    config: Config, fingerprints: dict[str, str]
) -> tuple[state.TrainState, dict[str, Any], dict[str, Any]]:
    """The state that a branch begins with, on the current mesh, its lineage for the records, and what
    was saved beside the state.

    Args:
        config: of the branch, as it is recorded.
        fingerprints: of the run's tokenizer and data.

    Raises:
        UserError: if the checkpoint is not there, damaged or another than when the branch was
            resolved; if its arrays are not those of this config; or if its tokenizer, or the
            content of a source that both read, is another.
    """
    branch = of(config)
    assert branch is not None
    with Checkpoints(branch.run / CHECKPOINTS) as checkpoints:
        meta = checkpoints.meta(branch.step)
        sha256 = checkpoints.fingerprint(branch.step)
        if not sha256.startswith(branch.sha256):
            raise UserError(
                f"step {branch.step} of {branch.run} is not the one that this run branches from: "
                f"its manifest's sha256 was {branch.sha256}, is {sha256[:DIGITS]}. Bring it back, "
                "or begin another run in another --workdir"
            )
        before, current = by_place(meta["fingerprints"]), by_place(fingerprints)
        differ = [k for k in before if current.get(k, before[k]) != before[k]]
        if differ:
            raise UserError(
                f"{branch.run} was trained with another {differ[0]} than this run reads: a branch "
                "has its trunk's tokenizer, and the content of a source that both read"
            )
        train_state = state.restore(config, checkpoints, branch.step)
    trunk: Config = recorded(meta["config"])
    knobs, knobs_of_trunk = (flatten(to_dict(c)) for c in (config, _with(trunk, branch)))
    changed = [k for k in knobs if meant(k, knobs[k]) != meant(k, knobs_of_trunk[k])]
    words = [f"{knob} {knobs_of_trunk[knob]!r} -> {knobs[knob]!r}" for knob in changed]
    say(
        f"branched from {branch.run} after step {branch.step}; changed: "
        f"{', '.join(words) or 'nothing'}"
    )
    if any(knob.startswith(ROWS) for knob in changed):
        say(
            f"from step {branch.step + 1} on it reads what a run with these data reads there: some "
            "that its trunk has read may come again before an epoch ends"
        )
    lineage = {
        "folder": str(branch.run),
        "step": branch.step,
        "manifest_sha256": sha256,
        "config": to_dict(trunk),
    }
    return train_state, lineage, meta


def _with(config: Config, branch: Branch) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, branch=str(branch)))


def _parse(text: str) -> tuple[Place, int | None]:
    """The folder and the step of RUN@STEP; None is the latest, which RUN alone means as well."""
    match = re.fullmatch(rf"(.+?)(?:@(\d+|{LATEST}))?", text)
    if not match:
        raise ConfigError(f"train.branch={text!r} names no run: write RUN@STEP")
    step = match[2]
    return expand(match[1]), None if step in (None, LATEST) else int(step)


def _find(run: Place, step: int | None) -> tuple[Branch, dict[str, Any]]:
    """A checkpoint of a run, and the config that it was saved with."""
    with Checkpoints(run / CHECKPOINTS) as checkpoints:
        if step is None and (step := checkpoints.latest()) is None:
            raise UserError(
                f"{run} holds no complete checkpoint to branch from: write RUN@STEP, or RUN alone "
                "for its latest"
            )
        tree = checkpoints.meta(step)["config"]
        return Branch(run, step, checkpoints.fingerprint(step)[:DIGITS]), tree
