"""A plan: one record of what a config needs, takes and costs on some hardware."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax import accounting, ledger
from gptjax.config import Config, to_dict
from gptjax.layers import attention
from gptjax.plan import compile, estimate
from gptjax.plan.compile import Compiled
from gptjax.plan.estimate import ANALYTIC, COMPILER, DAY, ESTIMATE, Figure
from gptjax.plan.hardware import DATE, MOST_VIRTUAL, Hardware

EXTRA = {"tpu": "plan", "gpu": "plan-cuda"}


def make(
    config: Config,
    hardware: Hardware,
    dollars: float | None = None,
    calibration: ledger.Entry | None = None,
) -> dict[str, Any]:
    """The plan as JSON; figures are [value, by what it is known].

    Args:
        config: the whole config.
        hardware: to plan for.
        dollars: an hour of a device; None is the table's.
        calibration: a run to forecast from, in place of the ledger's.

    Raises:
        UserError: where no such run could begin there.
    """
    mesh = estimate.mesh_of(config, hardware)
    settled = attention.resolve(config.model, hardware.chip.platform)
    attention.check(settled, hardware.chip.platform)
    config = dataclasses.replace(config, model=settled)
    compiled, how = _compile(config, hardware)
    real = compiled is not None and compile.compiler_for(hardware) is not None
    told = compiled if real else None
    counted = accounting.memory_bytes(config, mesh)
    memory = estimate.memory(counted, told)
    rows = []
    if compiled is not None and compiled.collectives is not None:
        rows = estimate.traffic(compiled.collectives, hardware)
    time = estimate.step_time(config, hardware, counted["total"], rows)
    entries = [calibration] if calibration is not None else ledger.read(hardware.chip.covers)
    record = {
        "on": hardware.name,
        "chip": {
            "kind": hardware.chip.kind,
            "memory": hardware.chip.memory,
            "usable": hardware.chip.usable,
            "peak": hardware.chip.peak,
            "date": DATE,
        },
        "devices": hardware.devices,
        "mesh": mesh,
        "attention": attention.kernel_for(config.model, config.model.context),
        "how": how,
        "compile": None
        if compiled is None
        else {"seconds": compiled.seconds, "host_bytes": compiled.host_bytes, "by": compiled.by},
        "parameters": accounting.parameters(config.model)["total"],
        "fits": _fits(hardware, memory, told),
        "memory": memory,
        "collectives": [{**row._asdict(), "by": COMPILER if real else ESTIMATE} for row in rows],
        "unread": None if compiled is None else compiled.unread,
        "arrays": [array._asdict() for array in estimate.arrays(config, mesh)],
        "config": to_dict(config),
    }
    return record | _time(config, hardware, time, dollars, ledger.forecast(entries))


def _compile(config: Config, hardware: Hardware) -> tuple[Compiled | None, str]:
    """What a compiler says, and in words which one was asked and why."""
    if (compiler := compile.compiler_for(hardware)) is not None:
        return compile.ask(config, hardware), f"compiled for it by {compiler}"
    lacking = f"pip install 'gptjax[{EXTRA[hardware.chip.platform]}]' brings its compiler"
    if hardware.devices > MOST_VIRTUAL:
        return None, f"closed forms alone, nothing was compiled: {lacking}"
    # Kernels of TPUs and GPUs are not for CPUs.
    elsewhere = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention="auto")
    )
    return (
        compile.ask(elsewhere, hardware),
        f"closed forms, and for the collectives a compile for {hardware.devices} virtual CPU "
        f"devices: {lacking}",
    )


def _fits(
    hardware: Hardware, memory: Mapping[str, Figure], told: Compiled | None
) -> dict[str, Any]:
    """Whether it fits, by what that is known, the bytes left (lacking: below 0), the compiler's words."""
    if told is not None and told.exhausted is not None:
        return {"fits": False, "by": COMPILER, "left": None, "words": told.exhausted}
    left = hardware.chip.usable - memory["total"].value
    return {"fits": left >= 0, "by": memory["total"].by, "left": left, "words": None}


def _time(
    config: Config,
    hardware: Hardware,
    time: estimate.Time,
    dollars: float | None,
    forecast: ledger.Forecast | None,
) -> dict[str, Any]:
    flops = accounting.train_flops_per_token(config, causal=True)
    tokens = config.data.batch_size * config.model.context
    price = hardware.chip.dollars if dollars is None else dollars
    an_hour = None if price is None else price * hardware.devices

    def of(seconds: float) -> dict[str, float | None]:
        days = seconds * config.train.steps / DAY
        return {
            "step": seconds,
            "mfu": time.compute / seconds,
            "days": days,
            "dollars": None if an_hour is None else days * 24 * an_hour,
        }

    record: dict[str, Any] = {
        "flops": {
            "token": Figure(flops, ANALYTIC),
            "step": Figure(flops * tokens, ANALYTIC),
            "run": Figure(flops * tokens * config.train.steps, ANALYTIC),
        },
        "seconds": {
            name: Figure(getattr(time, name), ESTIMATE)
            for name in ("compute", "memory", "network")
            if getattr(time, name) is not None
        },
        "range": {"low": of(time.low), "high": of(time.high), "by": ESTIMATE},
        "dollars_an_hour": an_hour,
        "forecast": None,
    }
    if forecast is not None:
        ratios = {"middle": forecast.ratio}
        if forecast.interval is not None:
            ratios |= {"low": forecast.interval.low, "high": forecast.interval.high}
        record["forecast"] = {
            **{name: of(time.compute * ratio) for name, ratio in ratios.items()},
            "runs": forecast.runs,
            "by": ESTIMATE,
        }
    return record
