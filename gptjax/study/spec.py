"""A study: its question, the runs that answer it, and what is decided before any of them.

A file in `experiments/` states all of it:

    STUDY = Study(
        hypothesis="Rotary positions beat learned ones at equal tokens.",
        base="configs/ablation.py",
        arms={"rope": {"model.position": "rope"}, "none": {"model.position": "none"}},
    )

The baseline is the base itself. A study becomes cells, one for each scale, arm and seed. A
cell's config decides its folder, so cells are shared by all studies and none runs twice. Arms
with the same seed see the same batches in the same order, and begin with the same values in
every parameter that they share: they differ by what the arm states, and are compared in pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax import branch, configure, setup, trained
from gptjax.config import Config, ConfigError, UserError, choose, fingerprint
from gptjax.records import meant
from gptjax.storage import expand
from gptjax.study.equalise import EQUAL, equalise

# Fields of metrics.jsonl that may decide, with their unit. Both are means over all held-out
# tokens at the last step; across tokenizers only the second compares.
METRICS = {"val_loss": "nats/token", "val_bits_per_byte": "bits/byte"}
TUNING = 1000  # tuning runs have seeds of their own from here on, so that choosing biases nothing

# What each field of a study must be.
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("hypothesis", "base", "baseline", "begin"), (str, "a text")),
    **dict.fromkeys(("metric", "equal", "name"), (str, "a text")),
    **dict.fromkeys(("arms", "settings", "tune", "scales"), (Mapping, "a mapping")),
    **dict.fromkeys(("seeds", "tuning_seeds"), (int, "a whole number")),
    "smallest": ((int, float), "a number"),
    "overrides": ((tuple, list), "a tuple of words"),
}

Settings = Mapping[str, Any]  # {"model.position": "rope"}
_check = functools.cache(setup.check_names)


@dataclasses.dataclass(frozen=True)
class Study:
    """A claim and the runs that test it.

    Attributes:
        hypothesis: what is expected, in a sentence.
        base: the recipe, FILE[:ARG].
        arms: name -> what differs from the base. To compare runs of the same recipe (A/A), an
            arm may set another "seed".
        baseline: the base's name in tables.
        begin: a pretrained model that all runs begin with, a folder or hf:ORG/NAME[@REVISION], as
            in `train --from`; "": random parameters.
        settings: what all arms set, the baseline too.
        seeds: runs of each arm, with seeds base.seed, base.seed + 1, ...; no winner under 3.
        metric: a row of METRICS, lower is better.
        equal: a row of EQUAL: what each arm's length or width is solved for.
        smallest: the smallest difference that matters, in the metric's unit.
        tune: optim.* knob -> values; each arm, the baseline too, runs at the values that do best
            for it in `tuning_seeds` runs made before, with other seeds.
        tuning_seeds: see `tune`.
        scales: name -> what all arms set at that scale, smallest first.
        overrides: words of the command line, "--config.train.steps=50", for all arms.
        name: for the report's folder.
    """

    hypothesis: str
    base: str
    arms: Mapping[str, Settings]
    baseline: str = "base"
    begin: str = ""
    settings: Settings = dataclasses.field(default_factory=dict)
    seeds: int = 5
    metric: str = "val_loss"
    equal: str = "tokens"
    smallest: float = 0.01
    tune: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    tuning_seeds: int = 1
    scales: Mapping[str, Settings] = dataclasses.field(default_factory=lambda: {"": {}})
    overrides: tuple[str, ...] = ()
    name: str = "study"

    def __post_init__(self) -> None:
        for name, (kind, expected) in KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"{name} must be {expected}, got {value!r}")
        for name, settings in (*self.arms.items(), *self.scales.items()):
            if not isinstance(name, str) or not isinstance(settings, Mapping):
                raise ConfigError(f"write a name and its knobs, not {name!r}: {settings!r}")
        choose(METRICS, self.metric, "metric")
        choose(EQUAL, self.equal, "equal")
        for field in ("seeds", "tuning_seeds", "smallest"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be above 0, got {getattr(self, field)}")
        if self.seeds > TUNING:
            raise ConfigError(
                f"seeds={self.seeds} is more than {TUNING}, where those of `tune` begin"
            )
        if self.baseline in self.arms:
            raise ConfigError(f"{self.baseline!r} is the baseline: name the arm otherwise")
        if foreign := [knob for knob in self.tune if not knob.startswith("optim.")]:
            raise ConfigError(f"tune: {foreign[0]} is no optim.* knob, and could change the budget")
        for knob, values in self.tune.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ConfigError(f"tune: {knob} must be a tuple of values, got {values!r}")
            if any(knob in s for s in (*self.arms.values(), *self.scales.values())):
                raise ConfigError(f"{knob} is tuned for each arm and scale: let none set it")
        if not self.scales:
            raise ConfigError("scales is empty: leave it out, or name one")

    @property
    def unit(self) -> str:
        return METRICS[self.metric]

    @property
    def all_arms(self) -> dict[str, Settings]:
        """The baseline, which sets nothing, and then the arms."""
        return {self.baseline: {}, **self.arms}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        scale, arm: names.
        seed: 0-based among the arm's runs; equal seeds are a pair.
        config: resolved, budgets held equal.
        solved: knob -> value that `equalise` found.
        initial: the fingerprint of the pretrained model that it begins with; "" of none.
    """

    scale: str
    arm: str
    seed: int
    config: Config
    solved: Settings
    initial: str = ""

    @property
    def address(self) -> str:
        """The name of its folder in the store of cells: what it is decides where it is."""
        return address(self.config, self.initial)

    @property
    def label(self) -> str:
        return f"{self.scale + ', ' if self.scale else ''}{self.arm}, seed {self.config.seed}"


def address(config: Config, initial: str = "") -> str:
    """The name of a run's folder in the store of cells, wherever lies what it begins with."""
    if (trunk := config.train.branch) is not None:
        train = dataclasses.replace(config.train, branch=meant("train.branch", trunk))
        config = dataclasses.replace(config, train=train)
    name = fingerprint(config)
    if initial:
        name = hashlib.sha256((name + initial).encode()).hexdigest()
    return name[:16]


def beginning(study: Study) -> setup.Start | None:
    """The parameters of `study.begin`.

    Raises:
        UserError: as `trained.start_of`.
    """
    return trained.start_of(expand(study.begin)) if study.begin else None


# (scale, arm) -> the values that tuning chose.
Tuned = Mapping[tuple[str, str], Settings]


def load(path: Path) -> Study:
    """The STUDY of a file, named after it.

    Raises:
        UserError: if there is no such file, it fails, or holds no Study.
    """
    if not path.is_file():
        raise UserError(f"no study {path}: name a file such as experiments/positions.py")
    try:
        study = runpy.run_path(str(path)).get("STUDY")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(study, Study):
        raise UserError(f"{path} must define STUDY = Study(...)")
    return dataclasses.replace(study, name=path.stem)


def of_axes(base: str, axes: Sequence[str]) -> Study:
    """The study of crossed axes, "model.position=learned,rope": the first values are the base.

    Raises:
        ConfigError: on an axis without two different values, or one that is no knob.
    """
    values: dict[str, list[str]] = {}
    for axis in axes:
        knob, equals, words = axis.partition("=")
        # A comma inside of brackets belongs to a value: model.windows=(None,),(None,64)
        options = re.findall(r"(?:\([^()]*\)|[^,()])+", words)
        complete = ",".join(options) == words
        options = [value.strip() for value in options]
        if not equals or not complete or len(options) < 2 or len(set(options)) < len(options):
            raise ConfigError(
                f"--axis {axis}: write a knob and two or more different values, such as "
                "model.position=learned,rope"
            )
        if knob in values:
            raise ConfigError(f"--axis {knob} is given twice")
        values[knob] = options
    arms = cross(values)
    (baseline, settings), *rest = arms.items()
    question = " or ".join(f"{knob} in ({', '.join(v)})" for knob, v in values.items())
    return Study(
        hypothesis=f"Exploratory: does {question} matter?",
        base=base,
        arms=dict(rest),
        baseline=baseline,
        settings=settings,
        name="-".join(knob.rpartition(".")[2] for knob in values),
    )


def cross(axes: Mapping[str, Sequence[Any]]) -> dict[str, Settings]:
    """Every combination of the axes' values, named "position=rope, peak_lr=1e-3"."""
    arms: dict[str, Settings] = {}
    for combination in itertools.product(*axes.values()):
        settings = dict(zip(axes, combination, strict=True))
        name = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in settings.items())
        arms[name] = settings
    return arms


def cells(study: Study, tuned: Tuned) -> list[Cell]:
    """The runs that decide; with `study.tune`, those of the arms that are in `tuned`.

    Raises:
        ConfigError: on a setting that is no knob, an arm equal to another, or budgets that
            cannot be made equal.
    """
    decisive: list[Cell] = []
    begin = beginning(study)
    for scale in study.scales:
        configs = _resolve(study, scale)
        for arm, (config, solved) in configs.items():
            if not study.tune:
                decisive += _seeds(begin, scale, arm, config, solved, study.seeds, 0)
            elif (scale, arm) in tuned:
                chosen = tuned[scale, arm]
                at_best = configure.override(config, _words(chosen))
                decisive += _seeds(begin, scale, arm, at_best, {**solved, **chosen}, study.seeds, 0)
    return decisive


def tuning_cells(study: Study) -> list[tuple[Cell, Settings]]:
    """The runs that choose each arm's values of `study.tune`, and those values."""
    tuning: list[tuple[Cell, Settings]] = []
    begin = beginning(study) if study.tune else None
    for scale in study.scales if study.tune else ():
        for arm, (config, solved) in _resolve(study, scale).items():
            for values in cross(study.tune).values():
                at_values = configure.override(config, _words(values))
                tuning_runs = _seeds(
                    begin, scale, arm, at_values, solved, study.tuning_seeds, TUNING
                )
                tuning += [(cell, values) for cell in tuning_runs]
    return tuning


def _seeds(
    begin: setup.Start | None, scale: str, arm: str, config: Config, solved: Settings, count: int,
    offset: int,
) -> list[Cell]:  # fmt: skip
    initial = "" if begin is None else begin.fingerprint
    configs = [dataclasses.replace(config, seed=config.seed + offset + i) for i in range(count)]
    return [Cell(scale, arm, i, config, solved, initial) for i, config in enumerate(configs)]


def _resolve(study: Study, scale: str) -> dict[str, tuple[Config, Settings]]:
    """Each arm's config at the base's seed, its budget equal to the baseline's."""
    shared = [*_words(study.settings), *_words(study.scales[scale]), *study.overrides]
    begun = functools.partial(trained.adopted, folder=expand(study.begin)) if study.begin else None
    base = branch.resolve(configure.from_file(study.base, shared))
    if begun:
        base = begun(base, overrides=shared)
    # Refused here, before hours of runs: a tuned knob that is none, a value that cannot be.
    for values in cross(study.tune).values() if study.tune else ():
        _check(configure.override(base, _words(values)))
    configs: dict[str, tuple[Config, Settings]] = {}
    for arm, settings in study.all_arms.items():
        try:
            of_arm = branch.resolve(configure.override(base, _words(settings)))
            config, solved = equalise(of_arm, base, study.equal, settings)
            if begun:
                config = begun(config, overrides=[*shared, *_words(settings)])
            _check(config)
        except UserError as error:
            raise ConfigError(f"arm {arm!r}: {error}") from error
        _check_comparable(study, arm, config, base)
        for earlier, (earlier_config, _) in configs.items():
            _check_apart(study, arm, config, earlier, earlier_config)
        configs[arm] = config, solved
    return configs


def check_names(study: Study) -> None:
    """Refuses names that no run of a study could have, where trunks and folders are not here.

    Raises:
        ConfigError: as `configure.from_file` and `setup.check_names`.
    """
    for scale in study.scales.values():
        shared = [*_words(study.settings), *_words(scale), *study.overrides]
        base = configure.from_file(study.base, shared)
        tuned = cross(study.tune).values() if study.tune else ()
        for settings in (*study.all_arms.values(), *tuned):
            config = configure.override(base, _words(settings))
            if not study.begin:  # else its names are of that model
                setup.check_names(config, folders=False)


def _check_comparable(study: Study, arm: str, config: Config, base: Config) -> None:
    """Refuses an arm whose metric is of other text, or in another unit, than the baseline's."""

    def same(knob: str) -> bool:
        mine, others = (getattr(c.data, knob) for c in (config, base))
        return meant(f"data.{knob}", mine) == meant(f"data.{knob}", others)

    same_tokenizer = same("tokenizer")
    if study.metric == "val_loss" and not same_tokenizer:
        raise ConfigError(
            f"arm {arm!r} has another tokenizer, so nats per token do not compare: "
            "set metric='val_bits_per_byte'"
        )
    # A prepared text lies elsewhere for each tokenizer.
    other_sources = same_tokenizer and not same("sources")
    if config.eval != base.eval or other_sources:
        raise ConfigError(
            f"arm {arm!r} is scored on other text than the baseline: set eval.* and "
            "data.sources for all arms, in the study's settings"
        )


def _check_apart(study: Study, arm: str, config: Config, other: str, other_config: Config) -> None:
    """Refuses two arms that are the same, or that would count the same runs twice."""
    if address(other_config) == address(config):
        raise ConfigError(
            f"arm {arm!r} is the same as {other!r}: leave it out, or set what it differs by"
        )
    reseeded = dataclasses.replace(other_config, seed=config.seed)
    if address(reseeded) == address(config) and abs(other_config.seed - config.seed) < study.seeds:
        raise ConfigError(
            f"arm {arm!r} shares runs with {other!r}: set their seeds {study.seeds} apart"
        )


def _words(settings: Settings) -> list[str]:
    return [f"--config.{knob}={value}" for knob, value in settings.items()]
