"""What a run leaves behind, so that its numbers can be audited and its start repeated.

    WORKDIR/config.json         the resolved config
    WORKDIR/environment.json    one record per start: versions, devices, mesh, git revision, and
                                fingerprints of the config's bytes, the data and the code
    WORKDIR/git.diff            the changes not in that revision; git.1.diff at the second start ...
    WORKDIR/metrics.jsonl       one object a line: {"step": 10, "loss": 4.2}
    WORKDIR/tensorboard/        the same numbers as curves

In a bucket nothing is appended to: there, both are put whole, every ten seconds at most and before
a checkpoint, so that what a checkpoint stands for is there.
    WORKDIR/diverged.json       {"step", "reason"}, of a run that diverged, until it is started again
    WORKDIR/failed.json         {"reason"}, of a study's run that could not run
    WORKDIR/begun               of a study's run: a byte for each start that has not ended, while a
                                process trains it, or where killed ones did and none has since

metrics.jsonl is strict JSON, which has no non-finite numbers: those are the strings "NaN",
"Infinity" and "-Infinity", which `float` reads back in Python, as `Number` does in JavaScript.
A resumed run drops what the killed one logged beyond its checkpoint, so that its log equals
that of a run which was never interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, SupportsFloat

import jax
import numpy as np

import gptjax
from gptjax.config import Config, ConfigError, UserError, flatten, from_dict, recorded, to_dict
from gptjax.locks import scratch
from gptjax.optim import make_schedule
from gptjax.progress import from_process_0, say
from gptjax.spike import SPIKES
from gptjax.storage import (
    BucketPath,
    Place,
    Unreachable,
    disk,
    expand,
    files,
    replace_file,
    replace_unchanged,
    whole,
)

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
TENSORBOARD = "tensorboard"
DIVERGED, FAILED, BEGUN = "diverged.json", "failed.json", "begun"

# What a resumed run may set anew: sections or knobs, none of which changes the function being
# trained or the order of its data. Those of the second line change the rounding of its sums, so
# that the curve goes on as another run of the same seed would, not bit for bit. Not eval, whose
# numbers would no longer compare along the curve.
MAY_CHANGE = (
    *(
        "train.watch",
        "train.watch_every",
        "train.log_every",
        "train.eval_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.hang_seconds",
    ),
    *("mesh", "model.scan_layers", "model.remat", "model.attention", "optim.loss_vocab_chunk"),
    *("sample",),
)

# These may change where that leaves every learning rate so far as it was, so that the run is what
# it would be had it begun so.
LENGTH = ("train.steps", "optim.schedule_steps")


def meant(knob: str, value: Any) -> Any:
    """What a knob says, however the places in it are spelt or linked to.

    Of a branch the step and the digest: they tell the bytes, wherever the trunk lies by now.
    """
    if knob == "data.sources":
        return [whole(source) for source in value]
    if knob == "data.tokenizer":
        return whole(value)
    if knob == "train.reward":  # its file is told by its content
        return value and value.rpartition(":")[2]
    return value and value.rpartition("@")[2] if knob == "train.branch" else value


def by_place(fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints whose names, such as data.runs/store, do not rest on how a place is spelt."""
    parts = ((name.partition("."), digest) for name, digest in fingerprints.items())
    return {kind + dot + (dot and whole(place)): digest for (kind, dot, place), digest in parts}


# What cannot change a run's numbers: it looks at finished runs, serves people, or makes what a
# run records by itself (its config). Every other source file counts, so a new one does.
NOT_COMPUTING = (
    *("cluster", "commands", "evaluation", "plan", "report", "serve", "sizes", "study"),
    *("accounting.py", "alive.py", "chat.py", "cli.py", "configure.py"),
    *("dialogues.py", "doctor.py", "ledger.py", "positions.py", "profile.py", "progress.py"),
    *("records.py", "replay.py", "signals.py", "speak.py", "status.py", "trained.py"),
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Settings of jax, by its environment variables too, that change how a program rounds or draws.
JAX_SETTINGS = (
    *("jax_default_matmul_precision", "jax_default_prng_impl", "jax_disable_most_optimizations"),
    *("jax_enable_x64", "jax_threefry_partitionable"),
)
FLUSH_SECONDS = 10  # between two syncs; on a disk metrics.jsonl needs none
logger = logging.getLogger(__name__)
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a NaN is told by the loop


class Run:
    """The open records of a run; made by `open_run`. Only process 0 writes."""

    def __init__(self, folder: Place, start: int, resume_step: int | None) -> None:
        self.folder = folder
        self._writes = jax.process_index() == 0
        if self._writes:
            # Where the files grow.
            self._scratch = contextlib.ExitStack()
            self._growing = (
                folder if isinstance(folder, Path) else self._scratch.enter_context(scratch())
            )
            self._put: dict[str, bytes] = {}  # in a bucket: the generations that this start put
            if isinstance(folder, BucketPath) and (folder / METRICS).is_file():
                content, self._put[METRICS] = (folder / METRICS).read_with_generation()
                (self._growing / METRICS).write_bytes(content)
            self._metrics = (self._growing / METRICS).open("ab", buffering=0)
            self._events = _events(self._growing / TENSORBOARD, start, resume_step)
            self._synced = time.monotonic()
            self._bring()  # so that the log is there from the start, as on a disk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A disk too full for the last curves must not hide the error that ended the run.
        with contextlib.suppress(*(() if error is None else (UserError, Unreachable))):
            self.close()

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends one line; on return it survives a kill of the process.

        What belongs to step s must be logged before the checkpoint of step s is saved: a
        resumed run keeps the lines up to its checkpoint, and does not compute them again.

        Raises:
            UserError: if the disk is full.
        """
        if not self._writes:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line = json.dumps({"step": step} | {k: portable(v) for k, v in numbers.items()}) + "\n"
        with disk(self.folder):
            # Unbuffered, so that a full disk shows here; it can take part of a line, unraised.
            if self._metrics.write(line.encode()) != len(line.encode()):
                raise OSError("No space left on device")
            self._curves(step, numbers)
        if time.monotonic() - self._synced > FLUSH_SECONDS:
            with contextlib.suppress(UserError, Unreachable):  # a bucket may be away for a while
                self.sync(wait=False)

    def sync(self, wait: bool = True) -> None:
        """Returns once all that was logged is where the run's folder lies, and stays there.

        Args:
            wait: for a bucket that is away, as `storage.patient` says.

        Raises:
            UserError: if it cannot be brought there.
            Unreachable: if a bucket is away.
        """
        if not self._writes:
            return
        self._synced = time.monotonic()
        with disk(self.folder):
            self._events.flush()
            os.fsync(self._metrics.fileno())
            self._bring(wait)

    def close(self) -> None:
        """Closes the files; logging afterwards is an error."""
        if self._writes:
            self._metrics.close()
            with disk(self.folder):
                self._events.close()
                with self._scratch:
                    self._bring()

    def _bring(self, wait: bool = True) -> None:
        """Puts the files into a bucket, unless another process has put them meanwhile."""
        if not isinstance(self.folder, BucketPath):
            return
        for name in files(self._growing):
            content = (self._growing / name).read_bytes()
            self._put[name] = replace_unchanged(
                self.folder / name, content, self._put.get(name), wait
            )

    def _curves(self, step: int, values: Mapping[str, float]) -> None:
        scalar, protos = _tensorboard("summary").scalar, _tensorboard("proto.event_pb2")
        for name, value in values.items():
            event = protos.Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._events.write_event(event)


def open_run(
    workdir: str | Place,
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    resume_step: int | None,
    branch: Mapping[str, Any] | None = None,
    initial: Mapping[str, Any] | None = None,
    saved: Mapping[str, Any] | None = None,
) -> Run:
    """Opens the records of a new run, or of one that goes on from a checkpoint.

    Args:
        workdir: the run's folder; made if absent.
        config: the resolved config as a plain dict (`config.to_dict`).
        fingerprints: of what the config only names: {"data": ..., "tokenizer": ...}.
        resume_step: the checkpoint's step; None starts anew and empties an older log.
        branch: what a new run begins with that is a branch of another, to be recorded.
        initial: the pretrained model that a run began with, to be recorded.
        saved: the checkpoint's meta, {"config": ..., "fingerprints": ...}: what the run was where
            its own files are gone.

    Raises:
        UserError: if the folder holds a run of another config (but for `MAY_CHANGE` and
            `LENGTH`) or of other data that has ever saved, or cannot be written.
    """
    folder, config = expand(workdir), json.loads(json.dumps(config))
    history, saved = read_environment(folder), saved or {}
    for kind, name in ((dict, "fingerprints"), (dict, "versions"), (str, "python")):
        if history and not isinstance(history[-1].get(name), kind):
            raise UserError(
                f"{folder / ENVIRONMENT} does not say the {name} of the last start: restore it, or "
                "use another --workdir"
            )
    # As process 0 sees it, which writes what all read here.
    anew = from_process_0("anew" * (resume_step is None and not _has_saved(folder, history))) != ""
    changed = _changed_knobs(folder, config, resume_step or 0, saved.get("config"), anew)
    before = history[-1]["fingerprints"] if history else saved.get("fingerprints", fingerprints)
    _same_data(folder, before, fingerprints, anew)
    if jax.process_index() == 0:
        if resume_step is not None and (software := _changed_software(history)):
            logger.warning(
                "%s goes on with other software, so the last bits of its numbers may differ: %s",
                folder, ", ".join(software),
            )  # fmt: skip
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps(config, indent=1).encode()
            replace_file(folder / CONFIG, content)
            record = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "resume_step": resume_step,
                "changed_knobs": changed,
                **({} if branch is None else {"branch": branch}),
                **({} if initial is None else {"initial": initial}),
                "config_sha256": hashlib.sha256(content).hexdigest(),
                "code": code_fingerprint(),
                "fingerprints": dict(fingerprints),
                "git": _git_state(folder, len(history)),
            } | environment()
            replace_file(folder / ENVIRONMENT, json.dumps([*history, record], indent=1).encode())
            _keep_up_to(folder / METRICS, -1 if resume_step is None else resume_step)
            (folder / DIVERGED).unlink(missing_ok=True)
    with disk(folder):
        return Run(folder, len(history), resume_step)


def read_metrics(workdir: str | Place) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, non-finite numbers as floats; a torn last line is left out.

    Raises:
        UserError: if another line is not JSON.
    """
    path = expand(workdir) / METRICS
    return [_numbers(json.loads(line)) for line in _whole_lines(path)]


def read_environment(workdir: str | Place) -> list[dict[str, Any]]:
    """The records of environment.json, one for each start; none where there is no such file.

    Raises:
        UserError: if it is not JSON of such a list.
    """
    path = expand(workdir) / ENVIRONMENT
    history = _read(path, [], list)
    if not all(isinstance(record, dict) for record in history):
        raise UserError(
            f"{path} is not a list of a run's starts: restore it, or use another --workdir"
        )
    return history


def _has_saved(folder: Place, history: list[dict[str, Any]]) -> bool:
    """Whether a run without a checkpoint once had one: its log is not to be lost by a mistake."""
    last = history[-1] if history else {}
    if last.get("resume_step") is not None or (folder / SPIKES).exists():
        return True
    if not (folder / CONFIG).exists():
        return False
    was: Config = recorded(_read(folder / CONFIG, None, dict))
    every = was.train.checkpoint_every
    begun = last.get("branch", {}).get("step", 0)
    logged = read_metrics(folder) if (folder / METRICS).exists() else []
    return any(line["step"] // every > begun // every for line in logged)


def _refuse(words: str, mend: str, anew: bool) -> None:
    if not anew:
        raise UserError(f"{words}. {mend}")
    say(f"{words}. It had saved nothing, and begins anew")


def _changed_knobs(
    folder: Place,
    config: Mapping[str, Any],
    done: int,
    saved: Mapping[str, Any] | None = None,
    anew: bool = False,
) -> dict[str, list[Any]]:
    """{knob: [before, now]} of the knobs that may change; others are an error if not `anew`."""
    path = folder / CONFIG
    tree = _read(path, saved, dict)
    if tree is None:
        return {}
    try:
        was: Config = recorded(tree)
    except ConfigError as error:
        path = path if path.exists() else folder
        raise UserError(f"{path} is not of this version of gptjax: {error}") from error
    before, after = flatten(to_dict(was)), flatten(config)
    changed = {
        knob: [before[knob], after[knob]]
        for knob in after
        if meant(knob, before[knob]) != meant(knob, after[knob])
    }
    refused = [knob for knob in changed if not _may_change(knob)]
    if refused and set(refused) <= set(LENGTH):
        _may_extend(folder, was, from_dict(config), done)
    elif refused:
        changes = "; ".join(f"{k} was {changed[k][0]!r}, is {changed[k][1]!r}" for k in refused)
        words = f"{folder} holds a run of another config: {changes}"
        _refuse(words, "Use another --workdir", anew)
    return changed


def _changed_software(history: list[Any]) -> list[str]:
    """What the last start had another version of: ["jax 0.10.2 -> 0.12.0"]."""
    if not history:
        return []
    before = history[-1]["versions"] | {"python": history[-1]["python"]}
    now = _versions() | {"python": platform.python_version()}
    changed = [
        f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]
    ]
    if history[-1].get("code") != code_fingerprint():
        changed.append("gptjax's code")
    return changed


def _versions() -> dict[str, str]:
    return {"gptjax": gptjax.__version__} | {p: importlib.metadata.version(p) for p in PACKAGES}


def _may_extend(folder: Place, was: Config, now: Config, done: int) -> None:
    """Refuses another length or schedule under which the `done` steps would have been others."""
    old, new = was.train.steps, now.train.steps
    if new < done:
        raise UserError(
            f"{folder} has trained {done} steps already, more than train.steps={new}: set it to "
            "more, or use another --workdir"
        )
    before, after = (
        np.broadcast_to(make_schedule(c.optim, c.train.steps)(np.arange(done)), done)
        for c in (was, now)
    )
    if not np.array_equal(before, after):
        end = was.optim.schedule_steps or old
        raise UserError(
            f"{folder} cannot go on from step {done} of {old} to {new}: optim.schedule="
            f"{now.optim.schedule!r} would have given its steps other learning rates. Leave the "
            f"schedule its end by --config.optim.schedule_steps={end}, after which the rate stays; "
            f"or begin another run from a checkpoint of this one: `train --branch={folder}@STEP`"
        )


def _may_change(knob: str) -> bool:
    return any(knob == name or knob.startswith(f"{name}.") for name in MAY_CHANGE)


def _same_data(
    folder: Place, before: Mapping[str, str], fingerprints: Mapping[str, str], anew: bool
) -> None:
    before, fingerprints = by_place(before), by_place(fingerprints)
    differ = [
        name for name in {**before, **fingerprints} if before.get(name) != fingerprints.get(name)
    ]
    if differ:
        words = (
            f"{folder} holds a run on other data: the content of {', '.join(differ)} changed "
            "since it started"
        )
        _refuse(words, "Bring the old content back, or use another --workdir", anew)


@functools.cache
def code_fingerprint() -> str:
    """A sha256 over the package's source files that can change what a run computes.

    Computed once: a process goes on with the code that it began with, whatever is edited since.
    """
    return _code_sha256(Path(gptjax.__file__).parent)


def _code_sha256(package: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(f for f in package.rglob("*.py") if f.is_file()):
        path = file.relative_to(package)
        names = {path.as_posix(), *(parent.as_posix() for parent in path.parents)}
        if names.isdisjoint(NOT_COMPUTING):
            content = file.read_bytes()
            digest.update(f"{path.as_posix()}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What a start runs on: versions, machine, devices, the current mesh, settings of XLA."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "backend": jax.default_backend(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),
        "mesh": dict(jax.sharding.get_mesh().shape),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax_settings": {name: str(jax.config.values[name]) for name in JAX_SETTINGS},
    }


def _cpu() -> str:
    """Model and cores that this process may use: XLA compiles for the one, splits over the other.

    "" where /proc does not tell.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
        return f"{model}, {len(os.sched_getaffinity(0))} cores"
    except (OSError, StopIteration):
        return ""


def _git(*arguments: str) -> bytes | None:
    """What git says about the checkout of this package; None where it has nothing to say."""
    command = ["git", "-C", str(Path(gptjax.__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _git_state(folder: Place, start: int) -> dict[str, Any] | None:
    """Revision and changes of the package's source, the diff written to `folder`.

    None for an installed package, even one that lies inside some other checkout (a .venv).
    """
    revision = _git("rev-parse", "HEAD")
    if revision is None or _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    diff = _git("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff") or b""
    untracked = _git("ls-files", "--others", "--exclude-standard", "--full-name", ":/") or b""
    name = f"git.{start}.diff" if start else "git.diff"
    if diff:
        replace_file(folder / name, diff)
    return {
        "revision": revision.decode().strip(),
        "dirty": bool(diff or untracked),
        "diff": name if diff else None,
        # Their names only: a diff would have to hold whatever lies about.
        "untracked": untracked.decode(errors="replace").splitlines(),
    }


def _events(folder: Path, start: int, resume_step: int | None) -> Any:
    """TensorBoard's file of this start, which hides what earlier starts logged too far.

    The plain `EventsWriter`, not `SummaryWriter`: that one's thread dies on a full disk, and
    the run then hangs on its queue. The suffix keeps two starts within a second apart, which
    would else overwrite each other.
    """
    EventsWriter = _tensorboard("event_file_writer").EventsWriter
    folder.mkdir(exist_ok=True)
    writer = EventsWriter(str(folder / "events"), f".{start}")
    if start:
        purge = 0 if resume_step is None else resume_step + 1
        pb = _tensorboard("proto.event_pb2")
        begin = pb.SessionLog(status=pb.SessionLog.START)
        writer.write_event(pb.Event(step=purge, wall_time=time.time(), session_log=begin))
    writer.flush()
    return writer


@functools.cache
def _tensorboard(module: str) -> Any:
    """A module of tensorboardX; importing it leaves PyTorch out.

    It imports PyTorch where that is installed, for two seconds and for nothing that a run needs.
    """
    if "torch" in sys.modules:
        return importlib.import_module(f"tensorboardX.{module}")
    sys.modules["torch"] = None  # type: ignore[assignment]  # so that `import torch` is refused
    try:
        return importlib.import_module(f"tensorboardX.{module}")
    finally:
        del sys.modules["torch"]


def _keep_up_to(path: Place, step: int) -> None:
    """Drops the lines of later steps, and a last line that a kill tore."""
    if path.exists():
        lines = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        content = b"".join(lines)
        if content != path.read_bytes():
            logger.warning("%s: dropping what was logged after step %d", path, step)
            replace_file(path, content)


def _whole_lines(path: Place) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    for number, line in enumerate(lines, 1):
        try:
            if not isinstance(json.loads(line)["step"], int):
                raise TypeError
            _numbers(json.loads(line))
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{path}:{number} is not a line of metrics: repair or delete it"
            ) from None
    return lines


def portable(value: float) -> float | str:
    """A number as strict JSON can hold it."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def strict_json(record: Any) -> str:
    """One line of JSON, in which each number of mappings and lists is `portable`."""

    def portable_value(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: portable_value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [portable_value(item) for item in value]
        return portable(value) if isinstance(value, float) else value

    return json.dumps(portable_value(record), allow_nan=False)


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) if isinstance(v, str) else v for k, v in line.items()}


def _read(path: Place, default: Any, kind: type) -> Any:
    if not path.exists():
        return default
    found = None
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_bytes())
    if not isinstance(found, kind):
        raise UserError(
            f"{path} is no JSON {'object' if kind is dict else 'list'}: restore it, or use another "
            "--workdir"
        )
    return found
