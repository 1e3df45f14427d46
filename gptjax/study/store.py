"""Where the runs of studies lie, and what each of them computes.

    STORE/ADDRESS/        a run; ADDRESS is a fingerprint of its config and, where it begins with a
                          pretrained model, of that
    STORE/ADDRESS.2/      another of the same address, which computes something else
        computes.json     what it computes: digests of programs, batches and data, and versions

A run belongs to a cell that has its address and computes the same. What it computes is given by the
lowered programs of initial values, step and evaluation (StableHLO, without names and locations),
by what they are fed, and by the versions of the packages: a comment, a refactor or another row of
a table changes none of it, another epsilon in a norm all. Lowering is spared where the code is
byte for byte that of the run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gptjax import branch, setup, state
from gptjax.config import Config, ConfigError, UserError, recorded
from gptjax.data.batches import Batch
from gptjax.records import CONFIG, ENVIRONMENT, code_fingerprint, environment, read_environment
from gptjax.sharding import make_mesh, section
from gptjax.storage import Place, changed, children, disk, replace_file
from gptjax.study.spec import Cell, address

COMPUTES = "computes.json"


def place(cell: Cell, store: Place, now: bool) -> Place:
    """The folder of a run, which may not exist yet.

    Args:
        cell: the run.
        store: the folder of all runs.
        now: take no folder whose run computes something else than this code would; without it,
            the only one of that address is taken whatever code made it.

    Raises:
        UserError: if this machine cannot determine what a folder's run computes.
    """
    folders = list(_of(cell, store))
    if len(folders) == 1 and not now:
        return folders[0]
    for folder in folders:
        if not differences(folder, cell):
            return folder
    name, number = cell.address, 1
    while (folder := store / (name if number == 1 else f"{name}.{number}")) in folders:
        number += 1
    return folder


def other_computations(cell: Cell, store: Place) -> dict[Place, list[str]]:
    """Runs of the same address that compute something else: {their folder: what differs}."""
    names = {folder: differences(folder, cell) for folder in _of(cell, store)}
    return {folder: differs for folder, differs in names.items() if differs}


def _of(cell: Cell, store: Place) -> Iterator[Place]:
    """The folders of runs of this address, that of its own name first.

    Older versions named folders by another fingerprint: their records tell.
    """
    name = cell.address
    folders = children(store)
    named = [f for f in folders if re.fullmatch(rf"{name}(\.\d+)?", f.name)]
    yield from sorted(named, key=lambda f: (len(f.name), f.name))
    for folder in folders:
        files = folder / CONFIG, folder / ENVIRONMENT
        if folder in named or not all(file.is_file() for file in files):
            continue
        if _address_in(folder, *map(changed, files)) == name:
            yield folder


@functools.cache
def _address_in(folder: Place, *changed: int) -> str | None:
    """Where the run in a folder would lie now; None if its config is none of this version."""
    try:
        initial = read_environment(folder)[-1]["fingerprints"].get("initial", "")
        return address(recorded(json.loads((folder / CONFIG).read_bytes())), initial)
    except (ConfigError, ValueError, TypeError, AttributeError):
        return None


def code_and_versions(record: Mapping[str, Any]) -> dict[str, str]:
    """The code and packages of a start."""
    return {"code": record["code"], **_versions(record["versions"])}


def current_code_and_versions() -> dict[str, str]:
    return code_and_versions({"code": code_fingerprint(), "versions": environment()["versions"]})


def _versions(versions: Mapping[str, str]) -> dict[str, str]:
    # gptjax's own version is left out: the programs show whether its code computes the same.
    return {f"version of {name}": v for name, v in versions.items() if name != "gptjax"}


def computation_recorded(folder: Place) -> bool:
    """Whether a run recorded what it computes, which older versions did not."""
    return (folder / COMPUTES).is_file()


def write(folder: Place, config: Config, mesh: jax.sharding.Mesh, initial: str) -> None:
    """Records what a run is about to compute, on its mesh, from its beginning."""
    computes = {"mesh": dict(mesh.shape), "facts": facts(config, mesh, initial)}
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / COMPUTES, json.dumps(computes, indent=1).encode())


def differences(folder: Place, cell: Cell) -> list[str]:
    """What the run in a folder does not share with one that would begin now, by its names.

    [] also for a run that recorded too little to compare (`computation_recorded`).

    Raises:
        UserError: if this machine cannot lower the program of that run.
    """
    history = read_environment(folder)
    if not computation_recorded(folder) or all(
        code_and_versions(record) == current_code_and_versions() for record in history
    ):
        return []
    computes = json.loads((folder / COMPUTES).read_bytes())
    devices, size = jax.devices(), math.prod(computes["mesh"].values())
    backend = history[-1]["backend"]
    if size > len(devices) or backend != jax.default_backend():
        raise UserError(
            f"{folder} was run by other code on {size} devices of {backend}, and here are "
            f"{len(devices)} of {jax.default_backend()}: whether it computes the same cannot be "
            "told. Go on with its code, or there; or use another --store"
        )
    mesh = make_mesh(section(computes["mesh"]), devices[:size])
    current_facts = facts(cell.config, mesh, cell.initial)
    recorded_facts = computes["facts"]
    return [
        name
        for name in recorded_facts | current_facts
        if recorded_facts.get(name) != current_facts.get(name)
    ]


def facts(config: Config, mesh: jax.sharding.Mesh, initial: str = "") -> dict[str, str]:
    """What a run computes, by names: digests, fingerprints, versions and settings.

    Args:
        config: of the run.
        mesh: that it runs on.
        initial: as of `Cell`.
    """
    with jax.set_mesh(mesh):
        opened = setup.set_up(config)
        rows = config.data.batch_size // config.train.accumulation
        fed: dict[str, Any] = {
            "first batch": setup.read_rows(opened, branch.first_step(config), 0, rows),
            "last batch": setup.read_rows(opened, config.train.steps - 1, 0, rows),
            **{f"windows of {name}": e.batch(0) for name, e in opened.evaluators.items()},
        }
    # The seed is a number in the programs, which the config tells: one lowering serves all seeds.
    config_without_seed = dataclasses.replace(config, seed=0)
    current, trunk = environment(), branch.of(config)
    return {
        "initial values": _initial(config_without_seed, mesh) if trunk is None else trunk.sha256,
        "step": _step(config_without_seed, mesh),
        "evaluation": _evaluation(config_without_seed, mesh),
        **{name: _digest_arrays(batch) for name, batch in fed.items()},
        **opened.fingerprints,
        **({"initial": initial} if initial else {}),
        **_versions(current["versions"]),
        **current["jax_settings"],
    }


@functools.cache
def _initial(config: Config, mesh: jax.sharding.Mesh) -> str:
    with jax.set_mesh(mesh):
        settled = setup.settle(config)
        return _digest(jax.jit(lambda: state.create(settled)).lower())


@functools.cache
def _step(config: Config, mesh: jax.sharding.Mesh) -> str:
    with jax.set_mesh(mesh):
        opened = setup.set_up(config)
        step: Any = state.make_train_step(opened.config)
        return _digest(step.lower(state.abstract(opened.config), setup.load_batch(opened, 0)))


@functools.cache
def _evaluation(config: Config, mesh: jax.sharding.Mesh) -> str:
    with jax.set_mesh(mesh):
        opened = setup.set_up(config)
        c = opened.config
        if opened.rollouts is not None:  # answers are no one program: only the same code gives them
            return code_fingerprint()

        def lower(evaluator: Any) -> jax.stages.Lowered:
            def score(train_state: state.TrainState, batch: Batch[jax.Array]) -> Any:
                return evaluator.program(state.evaluation_params(c, train_state), batch)

            return jax.jit(score).lower(state.abstract(c), evaluator.batch(0))

        programs = [lower(evaluator) for evaluator in opened.evaluators.values()]
        return _digest(*programs)


def _digest(*programs: jax.stages.Lowered) -> str:
    digest = hashlib.sha256()
    for program in programs:
        digest.update(nameless(program.as_text()).encode())
    return digest.hexdigest()


def nameless(program: str) -> str:
    """A program in StableHLO without the names that Python functions and results gave it."""
    order = list(dict.fromkeys(re.findall(r"func\.func (?:\w+ )?@([\w.$-]+)", program)))
    numbers = {name: f"@f{number}" for number, name in enumerate(order)}
    program = re.sub(r"@([\w.$-]+)", lambda match: numbers.get(match[1], match[0]), program)
    program = re.sub(r"^module @[\w.$-]+", "module", program)
    return re.sub(r'jax\.result_info = "[^"]*"', "", program)


def _digest_arrays(batch: Any) -> str:
    digest = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(batch):
        values = np.asarray(array)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()
