"""The figures of one GPU beside their targets, the most important first.

    python experiments/peers/gpu.py --out=runs/gpu --nanogpt=../nanoGPT

Each measurement runs in a process of its own, as in `run.py`, and is stopped after a time of its
own; what fails or is stopped is named, and the next begins. After each, OUT/results.md (every
figure, its target, whether it is met; then all that was measured) and OUT/results.json are written
anew: a run that is killed leaves what it had. docs/gpu.md says what to install, and what each part
takes. All of it computes in bfloat16.

  limits  FLOP/s of a bfloat16 matrix product of side 8,192, bytes/s of the memory.
  124m    GPT-2 124M, context 1,024, by configs/one_gpu.py, in turns with nanoGPT and a plain PyTorch
          GPT, both under torch.compile with autocast, fused AdamW and flash attention.
  1558m   GPT-2 1558M, likewise, gptjax alone.
  decode  both at batch 1, beside transformers and the bound: bandwidth / bytes of the weights.
  muon    a whole step of the recipe, of 512 rows, by Muon and by AdamW.
  fp8     model.products=fp8 against bfloat16: speed, and losses over 500 equal steps of 8 rows.
  packed  rows of four documents that do not see each other against rows of one.
  knobs   the recipe with one knob or flag of XLA changed.

Losses are of the same batches from the same weights; nanoGPT's GELU is the exact one, that of the
others the tanh form. MFU is the model's FLOPs, attention's counted causally, against the device's
published peak of dense bfloat16 products. With --smoke all parts run with tiny shapes on whatever
is here, within this process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measure
import run
from measure import PROMPT, Result

from gptjax.config import UserError
from gptjax.storage import replace_file

FLAGS = {  # of XLA, one at a time
    "latency-hiding scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "products by Triton too": "--xla_gpu_enable_triton_gemm=true",
    "query, key and value in one product": "--xla_gpu_dot_merger_threshold_mb=32",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
}
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # of the GPU's memory, for jax

GPT2 = {"context": 1024, "vocab_size": 50_304}
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {
        **GPT2, "recipe": "one_gpu.py:124m", "layers": 12, "width": 768, "heads": 12, "rows": 64,
        "steps": 20, "rate": 6e-4,
    },
    "1558m": {
        **GPT2, "recipe": "one_gpu.py:1558m", "layers": 48, "width": 1600, "heads": 25, "rows": 128,
        "steps": 3, "rate": 2e-4,
    },
}  # fmt: skip
SMOKE = {
    "layers": 1, "width": 16, "heads": 2, "rows": 16, "context": 32, "vocab_size": 65, "steps": 20,
}  # fmt: skip


class Measurement(NamedTuple):
    """One process.

    Attributes:
        subject: a row of `SHAPES`, or "machine".
        seconds: after which it is stopped.
        variant: what is other than usual, in words.
        knobs: overrides of the config, "optim.optimizer=muon".
        shape: what of the shape is other than usual.
        about: of the job besides.
        flags: of XLA, beside those of the environment.
    """

    subject: str
    task: str
    side: str
    seconds: float
    variant: str = ""
    knobs: tuple[str, ...] = ()
    shape: dict[str, Any] | None = None
    about: dict[str, Any] | None = None
    flags: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.subject, self.task, self.side, self.variant)))


def _train(
    variant: str, *knobs: str, flags: str = "", shape: Any = None, **about: Any
) -> Measurement:
    """gptjax's 124M with something changed."""
    return Measurement("124m", "train", "gptjax", 120, variant, knobs, shape, about, flags)


BASE = Measurement("124m", "train", "gptjax", 180)
CURVE = {"rows": 8, "steps": 500, "rate": 3e-4}
WHOLE = {"rows": 512, "steps": 2}  # a step of the recipe
PARTS: dict[str, list[Measurement]] = {
    "limits": [
        Measurement("machine", "limits", "PyTorch", 60),
        Measurement("machine", "limits", "jax", 60),
    ],
    "124m": [
        *2 * [BASE, Measurement("124m", "train", "nanoGPT", 180)],
        Measurement("124m", "train", "plain PyTorch", 180),
    ],
    "1558m": [Measurement("1558m", "train", "gptjax", 300, knobs=("train.accumulation=8",))],
    "decode": [
        Measurement(subject, "decode", side, 200)
        for subject in ("124m", "1558m")
        for side in ("gptjax", "transformers")
    ],
    "muon": [
        _train("whole step", "train.accumulation=8", shape=WHOLE),
        _train("whole step, Muon", "train.accumulation=8", "optim.optimizer=muon", shape=WHOLE),
    ],
    "fp8": [
        BASE,
        _train("fp8", "model.products=fp8"),
        _train("500 steps", shape=CURVE, curve=True),
        _train("500 steps, fp8", "model.products=fp8", shape=CURVE, curve=True),
    ],
    "packed": [BASE, _train("documents apart", documents=4)],
    "knobs": [
        BASE,
        _train("layers scanned", "model.scan_layers=True"),
        _train("logits in chunks", "optim.loss_vocab_chunk=8384"),
        _train("remat dots", "model.remat=dots"),
        *(_train(name, flags=flags) for name, flags in FLAGS.items()),
    ],
}
LIMIT_PREPARE = 240  # seconds to write the weights of a subject and the tokens


class Missing(Exception):
    """A figure that cannot be told, and why."""


class Runs(list[dict[str, Any]]):
    """What was measured: "part", "name" and a `Result` each."""

    def numbers(self, name: str, measured: str) -> list[float]:
        """A number of each process of that name."""
        runs = [r for r in self if r["name"] == name]
        return [run.middle(r[measured]) for r in runs if r.get(measured) is not None]

    def of(self, name: str, measured: str) -> list[float]:
        """The same.

        Raises:
            Missing: if there is none.
        """
        if numbers := self.numbers(name, measured):
            return numbers
        runs = [r for r in self if r["name"] == name]
        reasons = [r[key] for r in runs for key in ("failed", "absent") if key in r]
        raise Missing(reasons[0] if reasons else "not measured")

    def median(self, name: str, measured: str) -> float:
        return statistics.median(self.of(name, measured))

    def ratio(self, measured: str, ours: str, theirs: str) -> float:
        """The median of the ratios of the same round."""
        pairs = zip(self.of(ours, measured), self.of(theirs, measured), strict=False)
        return statistics.median(a / b for a, b in pairs)


class Figure(NamedTuple):
    """A line of the table.

    Attributes:
        value: of what was measured; raises `Missing`.
        least, most: what it is to reach, or not to exceed; None: it is told alone.
    """

    part: str
    what: str
    value: Callable[[Runs], float]
    least: float | None = None
    most: float | None = None


def speed(name: str) -> Callable[[Runs], float]:
    return lambda runs: runs.median(name, "tokens/s")


def mfu(subject: str, variant: str = "") -> Callable[[Runs], float]:
    """Percent of the published peak."""

    def value(runs: Runs) -> float:
        flops = runs.median(f"{subject} prepare gptjax", "flops_per_token")
        rate = runs.median(f"{subject} train gptjax{variant}", "tokens/s")
        return 100 * flops * rate / (1e9 * runs.median("machine device gptjax", "peak, GFLOP/s"))

    return value


def of_bound(subject: str, side: str) -> Callable[[Runs], float]:
    """Percent of the tokens/s at which all bfloat16 weights are read once a token."""

    def value(runs: Runs) -> float:
        limits = ("machine limits jax", "machine limits PyTorch")
        reads = [n for limit in limits for n in runs.numbers(limit, "memory read, GB/s")]
        if not reads:
            raise Missing("the bandwidth was not measured")
        size = 2 * runs.median(f"{subject} prepare gptjax", "parameters")
        rate = runs.median(f"{subject} decode {side}", "tokens/s, batch 1")
        return 100 * rate * size / (1e9 * max(reads))

    return value


def more_time(name: str, usual: str) -> Callable[[Runs], float]:
    """Percent of time that a step takes more."""
    return lambda runs: 100 * (runs.median(usual, "tokens/s") / runs.median(name, "tokens/s") - 1)


def times(name: str, usual: str, measured: str = "tokens/s") -> Callable[[Runs], float]:
    return lambda runs: runs.ratio(measured, name, usual)


def loss_apart(name: str, usual: str) -> Callable[[Runs], float]:
    key = "loss, last equal step"
    return lambda runs: runs.median(name, key) - runs.median(usual, key)


def curves_apart(summary: Callable[[list[float]], float]) -> Callable[[Runs], float]:
    """A summary of the differences of the losses of each step, fp8 minus bfloat16."""

    def value(runs: Runs) -> float:
        names = ("124m train gptjax 500 steps", "124m train gptjax 500 steps, fp8")
        curves = [
            [r["losses"] for r in runs if r["name"] == name and "losses" in r] for name in names
        ]
        if not all(curves):
            raise Missing("not measured")
        return summary([b - a for a, b in zip(curves[0][0], curves[1][0], strict=True)])

    return value


OURS, NANOGPT, PLAIN = (f"124m train {side}" for side in ("gptjax", "nanoGPT", "plain PyTorch"))
FIGURES = [
    Figure("124m", "124M: tokens/s", speed(OURS), least=500_000),
    Figure("124m", "124M: MFU, %", mfu("124m"), least=43),
    Figure("124m", "124M: times nanoGPT's tokens/s", times(OURS, NANOGPT), least=1.25),
    Figure("124m", "124M: times plain PyTorch's tokens/s", times(OURS, PLAIN)),
    Figure(
        "124m", "124M: peak memory, times nanoGPT's", times(OURS, NANOGPT, "peak memory, MB")
    ),
    Figure(
        "124m", "124M: time to the first step, cold, times nanoGPT's",
        lambda runs: runs.of(OURS, "first step, s")[0] / runs.of(NANOGPT, "first step, s")[0],
    ),
    Figure("124m", "124M: loss after 20 steps minus plain PyTorch's", loss_apart(OURS, PLAIN)),
    Figure("1558m", "1558M: MFU, %", mfu("1558m"), least=50),
    Figure("decode", "1558M: decoding at batch 1, % of the bound", of_bound("1558m", "gptjax"), least=80),
    Figure("decode", "124M: decoding at batch 1, % of the bound", of_bound("124m", "gptjax"), least=40),
    *(
        Figure(
            "decode", f"{subject.upper()}: decoding at batch {rows}, times transformers'",
            times(f"{subject} decode gptjax", f"{subject} decode transformers", f"tokens/s, batch {rows}"),
        )
        for subject in ("1558m", "124m") for rows in (1, 8)
    ),
    Figure(
        "muon", "124M: Muon's step takes more than AdamW's, %",
        more_time(f"{OURS} whole step, Muon", f"{OURS} whole step"), most=5,
    ),
    Figure("muon", "124M: MFU of the recipe's whole step, %", mfu("124m", " whole step")),
    Figure("fp8", "124M: fp8 products, times bfloat16's tokens/s", times(f"{OURS} fp8", OURS)),
    Figure(
        "fp8", "fp8: mean difference of the losses, last 50 of 500 steps",
        curves_apart(lambda d: statistics.fmean(d[-50:])),
    ),
    Figure(
        "fp8", "fp8: largest difference of a loss in 500 steps",
        curves_apart(lambda d: max(map(abs, d))),
    ),
    Figure(
        "packed", "124M: documents apart, times the tokens/s of one a row",
        times(f"{OURS} documents apart", OURS),
    ),
    *(
        Figure("knobs", f"124M: {m.variant}, times the recipe's tokens/s", times(m.name, OURS))
        for m in PARTS["knobs"]
        if m.variant
    ),
]  # fmt: skip


def judge(figure: Figure, runs: Runs) -> dict[str, Any]:
    """{"part", "figure", "value", "target", "met"}; without a value "why", and never met."""
    target = None
    if figure.least is not None:
        target = f"at least {figure.least:,g}"
    elif figure.most is not None:
        target = f"at most {figure.most:,g}"
    about = {"part": figure.part, "figure": figure.what, "target": target}
    try:
        value = figure.value(runs)
    except Missing as reason:
        return {**about, "value": None, "met": None, "why": str(reason)}
    met = None
    if figure.least is not None:
        met = value >= figure.least
    elif figure.most is not None:
        met = value <= figure.most
    return {**about, "value": value, "met": met}


def table(record: dict[str, Any]) -> str:
    """The Markdown of a record of `run_parts`."""
    machine, device = record["machine"], record["device"]
    lines = (
        ["Tiny shapes: the figures say that all runs, and no more.", ""] if record["smoke"] else []
    )
    lines += [
        f"Measured on {machine['date']} on one {device['device']}, {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory']}, Python {machine['python']}; "
        + ", ".join(f"{n} {v}" for n, v in machine["versions"].items() if v != "absent")
        + f". The peak: {device['peak from']}. bfloat16 throughout; medians over the processes.",
        "",
        "| part | figure | measured | target | met |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for figure in record["figures"]:
        value, what = figure["value"], figure["figure"]
        shown = figure["why"] if value is None else run.number(value, what)
        met = {True: "yes", False: "no", None: ""}[figure["met"]]
        lines.append(f"| {figure['part']} | {what} | {shown} | {figure['target'] or ''} | {met} |")
    lines += ["", "| process | measured |", "| --- | --- |"]
    for r in record["runs"]:
        result = {k: v for k, v in r.items() if k not in ("part", "name", "losses", "stderr")}
        cells = (f"{k} {_shown(v, k)}" for k, v in result.items() if v is not None)
        lines.append(f"| {r['name']} | {'; '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return run.number(value, what)
    middle, least, most = (run.number(f(value), what) for f in (run.middle, min, max))
    return f"{middle} ({least} to {most})"


def here(job: dict[str, Any], cache: Path, limit: float) -> Result:
    """A measurement within this process, for --smoke: it is not stopped."""
    try:
        return measure.answer(job)
    except Exception as error:  # whatever a side raises
        return {"failed": f"{type(error).__name__}: {error}"}


def plan(parts: Sequence[str]) -> Iterator[tuple[str, Measurement]]:
    """(part, measurement) in their order: none that an earlier part has, each subject prepared."""
    yield "limits", Measurement("machine", "device", "gptjax", 60)
    every = [m for part in parts for m in PARTS[part]]
    read = {m.subject for m in every if m.task == "decode" or m.side != "gptjax"}
    prepared: set[str] = set()
    earlier: set[str] = set()
    for part in parts:
        for m in [m for m in PARTS[part] if m.name not in earlier]:
            if m.task in ("train", "decode") and m.subject not in prepared:
                prepared.add(m.subject)
                about = {"weights": m.subject in read}
                yield part, Measurement(m.subject, "prepare", "gptjax", LIMIT_PREPARE, about=about)
            yield part, m
        earlier |= {m.name for m in PARTS[part]}


def run_parts(arguments: argparse.Namespace) -> int:
    """Measures and writes; returns the exit status."""
    measure_one = here if arguments.smoke else run.measure
    runs, end = Runs(), time.monotonic() + 60 * arguments.minutes
    record: dict[str, Any] = {"machine": run.describe_machine(), "smoke": arguments.smoke}
    general = {
        "device": "cuda",
        "dtype": "bfloat16",
        "seconds": 0.1 if arguments.smoke else arguments.seconds,
        "nanogpt": arguments.nanogpt and str(arguments.nanogpt.resolve()),
        "text": str(arguments.text.resolve()),
        "model": None,
        "smoke": arguments.smoke,
    }
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        for part, m in plan(arguments.parts):
            shape = SHAPES.get(m.subject, {}) | (m.shape or {}) | (SMOKE if arguments.smoke else {})
            folder = Path(work, m.subject)
            folder.mkdir(exist_ok=True)
            flags = f"{os.environ.get('XLA_FLAGS', '')} {m.flags}".strip()
            job = general | (m.about or {}) | {
                "task": m.task, "side": m.side, "folder": str(folder), "shape": shape,
                "matrix_side": 64 if arguments.smoke else 8192,
                # So many that the first cache holds them: each number of texts compiles once.
                "new_tokens": min(112, shape.get("context", 0) - PROMPT),
                "overrides": [f"--config.{knob}" for knob in m.knobs],
                "environment": ENVIRONMENT | ({"XLA_FLAGS": flags} if m.flags else {}),
                "started": time.time(),
            }  # fmt: skip
            programs = Path(work, "programs", m.side.replace(" ", "-"), m.subject)
            left, begin = end - time.monotonic(), time.monotonic()
            if left < 10:
                result = {"failed": "no time was left"}
            else:
                result = measure_one(job, programs, min(m.seconds, left))
            runs.append({"part": part, "name": m.name, **result})
            took = time.monotonic() - begin
            shown = {k: v for k, v in result.items() if k not in ("stderr", "losses")}
            print(f"{part}: {m.name}, {took:.0f} s: {shown}", flush=True)
            if m.task == "device":
                if "device" not in result:
                    raise UserError(f"jax does not start: {result}")
                record["device"] = result
                if result["platform"] != "gpu":
                    if not arguments.smoke:
                        raise UserError(
                            f"jax sees no GPU but {result['device']!r}: install gptjax[cuda12] or "
                            "[cuda13], or try the command with --smoke"
                        )
                    general["device"] = "cpu"
            figures = [figure for figure in FIGURES if figure.part in arguments.parts]
            if arguments.smoke:  # shapes that no target is of
                figures = [figure._replace(least=None, most=None) for figure in figures]
            record["figures"] = [judge(figure, runs) for figure in figures]
            record["runs"] = runs
            replace_file(
                arguments.out / "results.json", (json.dumps(record, indent=1) + "\n").encode()
            )
            replace_file(arguments.out / "results.md", table(record).encode())
    print(f"\n{table(record)}\nwritten: {arguments.out}/results.md, results.json")
    return int(any("failed" in r for r in runs))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results, new or without any")
    add("--parts", default=",".join(PARTS), help="with commas between, default %(default)s")
    add(
        "--minutes", type=float, default=30, help="of all, then nothing begins, default %(default)s"
    )
    add("--seconds", type=float, default=6, help="of each measuring, default %(default)s")
    add("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    add("--text", type=Path, default=run.TEXT, help="UTF-8, 1 MB or more, default the plays")
    add("--smoke", action="store_true", help="tiny shapes, within this process, on what is here")
    arguments = parser.parse_args(words)

    def check_and_run() -> int:
        arguments.parts = run.chosen(arguments.parts, PARTS, "--parts")
        if not 0 < arguments.minutes < 1e4 or not 0 < arguments.seconds < 3600:
            raise UserError("--minutes must be above 0, and --seconds above 0 and below 3,600")
        run.check_paths(arguments.out, arguments.nanogpt, arguments.text)
        return run_parts(arguments)

    return run.guarded("gpu", arguments.out, check_and_run)


if __name__ == "__main__":
    sys.exit(main())
