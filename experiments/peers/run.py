"""gptjax beside what users would pick instead, measured in turns on this machine.

    python experiments/peers/run.py --out=runs/peers --nanogpt=../nanoGPT

Each measurement runs in a process of its own. The sides take turns (A B A B ...), so that a machine
that slows down slows all of them. OUT gets results.md (the table), results.png (the picture) and
results.json (every number, the machine and the versions), anew after each measurement. Nothing is
judged: read a ratio beside its spread.

What is measured:

  limits    FLOP/s of a float32 matrix product of side 4,096, and bytes/s of memory by a matrix of
            512 MiB times a vector, in jax and in PyTorch.
  train     AdamW in float32 from the same weights on the same batches, at a constant rate: tokens/s;
            MFU, those times the model's FLOPs, attention's counted causally, against the faster
            product of the limits; seconds from the start of the process to the end of the first
            step, with an empty compilation cache (cold) and with a full one (warm; PyTorch keeps
            its precompiled C++ headers elsewhere, for all); peak resident memory of the process,
            without that of compilers that it starts; losses. nanoGPT's GELU is the exact one, that
            of all others the tanh form, so that its losses differ slightly.
  decode    greedy tokens/s after a prompt of 16 tokens, 1 and 8 texts at once, reading it included.
            The bound is the bandwidth divided by the bytes of float32 weights, times the texts, where
            the weights are more than caches hold.
  score     tokens/s of the losses of given texts, and their mean loss.
  tokenise  bytes/s with GPT-2's vocabulary: gptjax writes a whole token store, on all cores;
            tiktoken encodes in memory, on one.

Decoding and scoring use GPT-2 of the shape with random weights, or --model; gptjax does both in
`model.products=int8` as well, decoding from the blocks of a .gguf file too, and the rest in float32.
All of it runs on the CPU; `gpu.py` measures a GPU. Of the peers, what is not installed is left out
and named: `pip install -e ".[peers]"` gets all but nanoGPT, of which you make a checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from measure import MEASURES, PROMPT, Result

from gptjax.config import UserError, choose
from gptjax.storage import replace_file

TEXT = Path(__file__).parents[2] / "gptjax" / "data" / "assets" / "shakespeare.txt"

# `steps` are trained before `last_loss` is read and the clock starts; `rate` is the learning rate.
SHAPES: dict[str, dict[str, Any]] = {
    "a": {  # nanoGPT's CPU recipe
        "layers": 4, "width": 128, "heads": 4, "rows": 12, "context": 64, "vocab_size": 65,
        "steps": 100, "rate": 1e-3,
    },
    "b": {  # nanoGPT's character model
        "layers": 6, "width": 384, "heads": 6, "rows": 16, "context": 256, "vocab_size": 65,
        "steps": 10, "rate": 1e-3,
    },
    "c": {  # GPT-2 124M
        "layers": 12, "width": 768, "heads": 12, "rows": 2, "context": 256, "vocab_size": 50_304,
        "steps": 5, "rate": 6e-4,
    },
}  # fmt: skip
MODEL = {"rows": 2, "context": 1024}  # windows that --model scores
IN_CACHE = 256e6  # bytes of weights below which caches may hold them, and memory is no bound
TASKS = ("limits", "train", "decode", "score", "tokenise")
VERSIONS = (
    "gptjax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "numpy", "torch", "transformers", "tiktoken", "xllamacpp",
)  # fmt: skip
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")
ABOUT = ("subject", "task", "side", "round", "cache", "load")
Run = dict[str, Any]  # `ABOUT`, and a `Result`


class Turn(NamedTuple):
    round: int
    cache: str  # "cold" begins with an empty compilation cache, "warm" with what cold has left
    side: str


def order(sides: Sequence[str], rounds: int, caches: Sequence[str]) -> Iterator[Turn]:
    """A B A B: every side once before any has its next turn."""
    for number in range(rounds):
        for cache in caches:
            for side in sides:
                yield Turn(number, cache, side)


def measure(job: dict[str, Any], cache: Path, limit: float | None = None) -> Result:
    """Runs one measurement in a process of its own, which keeps compiled programs in `cache`.

    Args:
        limit: seconds, after which it is stopped and has failed.
    """
    kept_by_jax = {"JAX_COMPILATION_CACHE_DIR": ""}  # empty: gptjax keeps them as its commands do
    caches = {"GPTJAX_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    program = Path(__file__).with_name("measure.py")
    command = [sys.executable, str(program), json.dumps(job | {"started": time.time()})]
    hidden = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if job["device"] == "cpu" else {}
    environment = os.environ | caches | kept_by_jax | hidden | job.get("environment", {})
    # A session of its own, so that what it starts ends with it.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {limit:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        lines = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", errors, re.MULTILINE)
        reason = (lines or errors.split("\n"))[-1] or f"exit status {process.returncode}"
        return {"failed": reason, "stderr": errors[-4000:]}
    return json.loads(output.splitlines()[-1])


# --- the table and the picture -----------------------------------------------------------------


class Row(NamedTuple):
    """One side's share in the table; numbers are medians over processes.

    Attributes:
        subject: a shape, the model or the machine.
        what: task and measure.
        ratios: ours divided by this side's, of the processes of the same round; [] of ours.
    """

    subject: str
    what: str
    side: str
    median: float
    least: float
    most: float
    ratios: list[float]


def middle(value: float | list[float]) -> float:
    """Of the turns within a process, the median."""
    return statistics.median(value) if isinstance(value, list) else value


def derive(runs: list[Run]) -> list[Run]:
    """The runs with what follows from several: MFU, and the bound of decoding."""
    measured = [run for run in runs if "absent" not in run and "failed" not in run]
    limits = [run for run in measured if run["task"] == "limits"]
    costs = {run["subject"]: run for run in measured if run["task"] == "prepare"}
    derived = [dict(run) for run in measured if run["task"] != "prepare"]
    if not limits:
        return derived

    def best(limit: str) -> float:
        sides = {run["side"] for run in limits}
        of_side = lambda side: [middle(r[limit]) for r in limits if r["side"] == side]  # noqa: E731
        return max(statistics.median(of_side(side)) for side in sides)

    for run in derived:
        if run["task"] == "train":
            flops = middle(run["tokens/s"]) * costs[run["subject"]]["flops_per_token"]
            run["MFU, %"] = 100 * flops / (1e9 * best("float32 product, GFLOP/s"))
    for run in [run for run in derived if (run["task"], run["side"]) == ("decode", "gptjax")]:
        weights = 4 * costs[run["subject"]]["parameters"]
        if weights >= IN_CACHE:
            readings = 1e9 * best("memory read, GB/s") / weights  # of all weights, a second
            bound = {f"tokens/s, batch {rows}": rows * readings for rows in (1, 8)}
            about = {key: run[key] for key in ABOUT}
            derived.append(about | {"side": "bound, float32"} | bound)
    return derived


def rows_of(runs: list[Run]) -> list[Row]:
    """The table, in the order of the runs."""
    values: dict[tuple[str, str], dict[str, dict[tuple[int, str], float]]] = {}
    for run in derive(runs):
        for key, value in run.items():
            if key in ABOUT or value is None:
                continue
            by_cache = run["task"] == "train" and key in ("first step, s", "peak memory, MB")
            what = f"{run['task']}: {key}" + f", {run['cache']}" * by_cache
            sides = values.setdefault((run["subject"], what), {})
            sides.setdefault(run["side"], {})[run["round"], run["cache"]] = middle(value)
    rows = []
    for (subject, what), sides in values.items():
        ours = sides.get("gptjax", {})
        for side, turns in sides.items():
            others = turns if side != "gptjax" else {}
            ratios = [ours[turn] / others[turn] for turn in others if turn in ours]
            least, most = min(turns.values()), max(turns.values())
            median = statistics.median(turns.values())
            rows.append(Row(subject, what, side, median, least, most, ratios))
    return rows


def number(value: float, what: str) -> str:
    """Four digits, of losses all that float32 has."""
    whole = len(str(int(abs(value))))
    return f"{value:.5f}" if "loss" in what else f"{value:,.{max(0, 4 - whole)}f}"


def table(record: dict[str, Any]) -> str:
    """The Markdown of a record of `main`."""
    machine, runs = record["machine"], record["runs"]
    loads = [run["load"] for run in runs]
    lines = [
        f"Measured on {machine['date']} on {machine['processor']}, {machine['cores']} cores "
        f"({', '.join(machine['features'])}), {machine['memory']}, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f". Rounds: {record['rounds']}. Medians over processes, with the least and the most of "
        "them. Ratios are those of the same round: median, least to most. Load average before a "
        f"measurement: {min(loads):.1f} to {max(loads):.1f}. Far above the cores, other work ran "
        "beside, and no figure is to be trusted.",
        "",
        "| of | what | side | median | least to most | gptjax / it |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows_of(runs):
        median, least, most = (number(v, row.what) for v in (row.median, row.least, row.most))
        ratio = ""
        if row.ratios:
            spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"
            ratio = f"{statistics.median(row.ratios):.2f} ({spread})"
        cells = (row.subject, row.what, row.side, median, f"{least} to {most}", ratio)
        lines.append(f"| {' | '.join(cells)} |")
    for reason in ("absent", "failed"):
        gone = (
            f"{r['subject']}, {r['task']}, {r['side']}: {r[reason]}" for r in runs if reason in r
        )
        lines += [f"\n{reason}: {line}" for line in dict.fromkeys(gone)]
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], picture: Path) -> None:
    """A panel for each measure, a bar for each side, its spread as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows_of(record["runs"]) if "loss" not in row.what]
    panels = list(dict.fromkeys((row.subject, row.what) for row in rows))
    columns = 3
    down = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        down, columns, figsize=(4.2 * columns, 1.5 * down), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (subject, what) in zip(axes.flat, panels, strict=False):
        bars = [row for row in rows if (row.subject, row.what) == (subject, what)][::-1]
        middles = [bar.median for bar in bars]
        reach = [[b.median - b.least for b in bars], [b.most - b.median for b in bars]]
        colours = ["C0" if bar.side.startswith("gptjax") else "C7" for bar in bars]
        axis.barh([bar.side for bar in bars], middles, xerr=reach, color=colours)
        axis.set_title(f"{subject}: {what}", fontsize=9)
    machine = record["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores, {machine['date']}")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def describe_machine() -> dict[str, Any]:
    processor, flags, memory = platform.processor() or platform.machine(), [], "memory unknown"
    if Path("/proc/cpuinfo").is_file():
        about = dict(
            map(str.strip, line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
        processor = about.get("model name", processor)
        flags = (about.get("flags") or about.get("Features", "")).split()
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in flags],
        "memory": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": time.strftime("%Y-%m-%d"),
    }


# --- the command -------------------------------------------------------------------------------


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(subject, task, what the job is about), in the order of measuring."""
    tasks, model = arguments.tasks, arguments.model
    for task in ("limits", "tokenise"):
        if task in tasks:
            yield "machine", task, {"matrix_side": 4096}
    on_model = [task for task in ("decode", "score") if task in tasks]
    for name in arguments.shapes:
        wanted = [*(["train"] if "train" in tasks else []), *([] if model else on_model)]
        shape = SHAPES[name]
        new = min(128, shape["context"] - PROMPT)
        for task in ["prepare", *wanted] if wanted else []:
            yield name, task, {"shape": shape, "model": None, "new_tokens": new}
    if model:
        for task in ["prepare", *on_model] if on_model else []:
            yield model.name, task, {"shape": MODEL, "model": str(model), "new_tokens": 128}


def run(arguments: argparse.Namespace, out: Path) -> int:
    """Measures, and writes what there is after each measurement. Returns the exit status."""
    runs: list[Run] = []
    record = {"machine": describe_machine(), "rounds": arguments.rounds, "runs": runs}
    general = {
        "device": "cpu",
        "dtype": "float32",
        "seconds": arguments.seconds,
        "nanogpt": arguments.nanogpt and str(arguments.nanogpt.resolve()),
        "text": str(arguments.text.resolve()),
    }
    with tempfile.TemporaryDirectory(prefix="peers-") as work:
        for subject, task, about in jobs(arguments):
            folder = Path(work, subject)
            folder.mkdir(exist_ok=True)
            gone: set[str] = set()
            rounds = 1 if task == "prepare" else arguments.rounds
            caches = ("cold", "warm") if task == "train" else ("warm",)
            for number, cache, side in order(list(MEASURES[task]), rounds, caches):
                if side in gone:
                    continue
                job = general | about | {"task": task, "side": side, "folder": str(folder)}
                # Apart, and for training each round anew. No blanks: PyTorch's compiler fails on them.
                part = str(number) if task == "train" else task
                programs = Path(work, "programs", side.replace(" ", "-"), subject, part)
                load = os.getloadavg()[0]  # of other jobs too: a sign of noise
                result = measure(job, programs)
                keys = {"subject": subject, "task": task, "side": side}
                runs.append({**keys, "round": number, "cache": cache, "load": load, **result})
                shown = {k: middle(v) for k, v in result.items() if k != "stderr" and v is not None}
                print(f"{subject} {task} {side}, round {number}, {cache}: {shown}", flush=True)
                if "absent" in result or "failed" in result:
                    gone.add(side)
                replace_file(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
                replace_file(out / "results.md", table(record).encode())
            if task == "prepare" and gone:
                raise UserError(runs[-1].get("failed") or runs[-1]["absent"])
    draw(record, out / "results.png")
    print(f"\n{table(record)}\nwritten: {out}/results.md, results.json, results.png")
    return int(any("failed" in run for run in runs))


def chosen(words: str, table: dict[str, Any], name: str) -> list[str]:
    for word in words.split(","):
        choose(table, word, name)
    return words.split(",")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = "; ".join(
        f"{name}: {s['layers']} layers x {s['width']}, {s['rows']} rows x {s['context']} tokens, "
        f"vocabulary {s['vocab_size']:,}"
        for name, s in SHAPES.items()
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results, new or without any")
    add("--shapes", default="a", help=f"with commas between, default a. {shapes}")
    add("--tasks", default=",".join(TASKS), help="with commas between, default %(default)s")
    add("--rounds", type=int, default=3, help="turns of each side, default %(default)s")
    add("--seconds", type=float, default=6, help="of each measuring, default %(default)s")
    add("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    add("--model", type=Path, help="Hugging Face folder or .gguf file to decode and score")
    add("--text", type=Path, default=TEXT, help="UTF-8, 1 MB or more, default the shipped plays")
    arguments = parser.parse_args(words)

    def check_and_run() -> int:
        arguments.shapes = chosen(arguments.shapes, SHAPES, "--shapes")
        arguments.tasks = chosen(arguments.tasks, dict.fromkeys(TASKS), "--tasks")
        if arguments.rounds < 1 or not 0 < arguments.seconds < 3600:
            raise UserError("--rounds must be at least 1, and --seconds above 0 and below 3,600")
        check_paths(arguments.out, arguments.nanogpt, arguments.model, arguments.text)
        return run(arguments, arguments.out)

    return guarded("peers", arguments.out, check_and_run)


def check_paths(out: Path, nanogpt: Path | None, *paths: Path | None) -> None:
    """Makes the folder of the results; refuses one that has any, and what is not there."""
    if nanogpt and not (nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt={nanogpt} holds no model.py: clone nanoGPT there")
    for path in filter(None, paths):
        if not path.exists():
            raise UserError(f"{path} is not there: name another")
    if (out / "results.json").exists():
        raise UserError(f"{out} holds results: name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)


def guarded(name: str, out: Path, command: Callable[[], int]) -> int:
    """The exit status of a command, whose mistakes become a line."""
    try:
        return command()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {out} has what was measured", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{name}: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
