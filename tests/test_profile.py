"""Time by part adds up, and every operation of a step is of the part that wrote it."""

from __future__ import annotations

import contextlib
import re
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from gptjax import accounting, loop, setup, state
from gptjax.accounting import PARTS, part_of
from gptjax.cli import main
from gptjax.config import Config, UserError
from gptjax.profile import (
    NAMES_IN_KEY,
    NO_OPERATION,
    NOTHING,
    OTHER_PROGRAMS,
    Event,
    Profiler,
    parse_steps,
    read_program,
    shares,
    time_by_part,
)
from gptjax.records import read_metrics
from gptjax.study.store import nameless
from tests import tiny
from tests.test_loop import CLOCK


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_store(tmp_path_factory.mktemp("text"))


# --- which steps ------------------------------------------------------------------------------


def test_steps_are_a_first_and_a_last() -> None:
    assert parse_steps(None) == NOTHING
    assert list(parse_steps("10:13")) == [10, 11, 12, 13]
    assert list(parse_steps("1")) == list(parse_steps("1:1")) == [1]
    assert len(parse_steps("1:100")) == 100


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "0",
        "0:3",
        "5:4",
        "-1",
        "3:",
        ":3",
        "1:2:3",
        "ten",
        "1.5",
        "1-3",
        " 1",
        "१",
        "1" * 5000,
    ],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is neither a step nor FIRST:LAST, such as 10:13.*count"):
        parse_steps(text)


def test_more_steps_than_a_trace_holds_are_refused() -> None:
    with pytest.raises(UserError, match="--profile=5:105 are 101 steps: choose at most 100"):
        parse_steps("5:105")


# --- the rules of the sums --------------------------------------------------------------------


def test_operations_that_run_at_once_share_the_time() -> None:
    first = [Event(0, 10, "a"), Event(10, 14, "b"), Event(20, 21, "b"), Event(30, 30, "d")]
    second = [Event(5, 12, "c")]
    # 0-5 a; 5-10 a, c; 10-12 b, c; 12-14 b; 14-20 none; 20-21 b
    assert shares([*first, *second]) == {"a": 7.5, "b": 4.0, "c": 3.5, "d": 0}
    assert shares([*second, *reversed(first)]) == shares([*first, *second])
    assert shares(first) == {"a": 10, "b": 5, "d": 0}
    assert shares([*first, *first]) == shares(first)
    assert shares([Event(0, 3, "a"), Event(0, 3, "a"), Event(0, 3, "b")]) == {"a": 2, "b": 1}
    assert shares([]) == {}


HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused_computation (p: f32[4]) -> f32[4] {
  ROOT %multiply.1 = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(step)/jvp(loss)/mul"}
}

ENTRY %main.5 (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0), metadata={op_name="state"}
  %dot.2 = f32[4]{0} dot(%x), metadata={op_name="jit(step)/jvp(Block)/attention/query/dot_general" source_line=3}
  %copy.3 = f32[4]{0} copy(%dot.2)
  %while.4 = (s32[], f32[4]{0}) while(%copy.3), condition=%c, body=%b, metadata={op_name="jit(step)/Block/while"}
  ROOT %fusion.7 = f32[4]{0} fusion(%copy.3), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(step)/optimizer/mul"}
}
"""


class Thing(NamedTuple):
    """Of a trace: what jax's profiler has at a plane, a line and an event, in nanoseconds."""

    name: str
    lines: tuple[Thing, ...] = ()
    events: tuple[Thing, ...] = ()
    start_ns: float = 0
    end_ns: float = 0
    stats: tuple[tuple[str, Any], ...] = ()


def event(name: str, start: float, end: float, **stats: Any) -> Thing:
    return Thing(name, start_ns=start, end_ns=end, stats=tuple(stats.items()))


def trace(**planes: list[Thing]) -> Any:
    there = [
        Thing(name.replace("_", ":"), (Thing("", events=tuple(e)),)) for name, e in planes.items()
    ]
    return types.SimpleNamespace(planes=[*there, Thing("/host:metadata", (Thing(""),))])


def test_a_program_tells_the_part_of_each_instruction() -> None:
    program = read_program(HLO)
    assert program.name == "jit_step" and program.control == {"while.4"}
    assert program.parts == {
        "multiply.1": "loss", "x": "other", "dot.2": "attention", "copy.3": "other",
        "while.4": "stream", "fusion.7": "optimizer",
    }  # fmt: skip


def test_a_cpu_tells_operations_that_spread_over_threads_twice() -> None:
    of = {"hlo_module": "jit_step"}
    events = [
        event("dot.2", 0, 4e9, hlo_op="dot.2", _p=7, **of),
        event("while.4", 0, 9e9, hlo_op="while.4", _p=8, **of),
        event("fusion.7", 5e9, 6e9, hlo_op="fusion.7", _p=9, **of),
        event("end: fusion.7", 8e9, 8e9, _c=9),
        event("end: fusion.7", 99e9, 99e9, _c=1),
        event("dot.2", 8e9, 9e9, hlo_op="dot.2", hlo_module="jit_watch"),
        event("Wait for usage holds", 0, 10e9),
    ]
    assert time_by_part(trace(host_CPU=events), HLO, 12.0) == {
        "attention": 4, "optimizer": 3, OTHER_PROGRAMS: 1, NO_OPERATION: 4
    }  # fmt: skip


def test_devices_are_averaged_and_their_host_left_out() -> None:
    """As a GPU tells them, and as a TPU does, which names an event by its HLO."""
    of = {"hlo_module": "jit_step"}
    planes = {
        "/device_GPU_0": [event("gemm", 0, 4e9, hlo_op="dot.2", **of)],
        "/device_TPU_1": [
            event("%dot.2 = f32[4]{0} dot(%x)", 0, 2e9),
            event("%fusion.7 = f32[4]{0} fusion(%copy.3)", 2e9, 4e9),
            event("jit_step(123)", 0, 9e9),
        ],
        "/host_CPU": [event("dot.2", 0, 9e9, hlo_op="dot.2", **of)],
    }
    assert time_by_part(trace(**planes), HLO, 5.0) == {
        "attention": 3, "optimizer": 1, NO_OPERATION: 1
    }  # fmt: skip
    assert time_by_part(trace(), HLO, 5.0) == {NO_OPERATION: 5}


# --- the scopes of a step ---------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scanned": {"model__scan_layers": True, "train__accumulation": 2},
    "remat": {"model__remat": "full", "model__scan_layers": True},
    "untied": {"model__tied": False, "optim__loss_vocab_chunk": 88, "model__norm_placement": "sandwich"},
}  # fmt: skip


def lower(config: Config) -> tuple[Any, Any, Any]:
    config = setup.settle(config)
    opened = setup.set_up(config)
    return state.make_train_step(config), state.abstract(config), setup.load_batch(opened, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_products_of_a_step_are_of_the_parts_that_are_counted(
    variant: str, store: Path
) -> None:
    """Three of each forward product, wherever the scope went: backward, scanned, summed."""
    config = tiny.config(store, model__layers=2, model__attention="plain", **VARIANTS[variant])
    with jax.set_mesh(tiny.mesh()):
        step, *arguments = lower(config)
        jaxpr = jax.make_jaxpr(step)(*arguments)
    flops: dict[str, float] = dict.fromkeys(PARTS.values(), 0)
    for product in accounting._walk(jaxpr.jaxpr, "", 1):
        flops[product.part] += product.flops
    tokens = config.data.batch_size * config.model.context
    expected = accounting.flops_by_part(config.model, causal=False)
    again = {
        # All of a block's, but for the last of the feed-forward, which no gradient reads.
        "remat": {"attention": 4 / 3, "scores": 4 / 3, "feedforward": 7 / 6},
        "untied": {"unembedding": 4 / 3},  # in chunks of the vocabulary
    }
    for part, n in expected.items():
        times = again.get(variant, {}).get(part, 1)
        assert flops.pop(part) == pytest.approx(times * n * tokens), part
    assert not any(flops.values()), flops


def test_scopes_change_no_program(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So cells of studies and finished runs are those that they were."""
    config = tiny.config(store, **VARIANTS["scanned"], optim__ema_decay=0.9)

    def text() -> tuple[str, str]:
        jax.clear_caches()
        with jax.set_mesh(tiny.mesh(data=2)):
            step, *arguments = lower(config)
            lowered = step.lower(*arguments)
        return nameless(lowered.as_text()), lowered.as_text(debug_info=True)

    program, named = text()
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    bare, unnamed = text()
    assert program == bare
    for scope in ("optimizer", "loss", "unembedding", "gradients"):
        written = re.compile(rf'loc\("[^"]*\b{scope}\)*/')
        assert written.search(named) and not written.search(unnamed) and scope not in program


def test_part_of_a_scope() -> None:
    assert part_of("jit(step)/jvp(Block)/attention/query/dot_general") == "attention"
    assert part_of("jit(step)/transpose(jvp(Block))/attention/attention_kernel/mul") == "scores"
    assert part_of("jit(step)/transpose(jvp(Block/feedforward_norm_in))/mul") == "norm"
    assert part_of("jit(step)/jvp(Block)/add") == "stream"
    assert part_of("jit(step)/jvp(loss)/unembedding/dot_general") == "unembedding"
    assert part_of("jit(step)/broadcast_in_dim") == part_of("") == "other"


# --- a traced run -----------------------------------------------------------------------------


def profiled(
    store: Path, workdir: Path, steps: str | None, mesh: dict[str, int], **knobs: Any
) -> list[dict[str, Any]]:
    with jax.set_mesh(tiny.mesh(**mesh)):
        loop.train(tiny.config(store, **knobs), workdir, profile=parse_steps(steps))
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(workdir)]


def table(said: str) -> dict[str, tuple[float, float]]:
    """Part -> milliseconds and percent."""
    rows = re.findall(r"^│ ([a-z ]+?) +│ +([\d,.]+) │ +([\d.]+)% │$", said, re.MULTILINE)
    return {part: (float(ms.replace(",", "")), float(share)) for part, ms, share in rows}


RUNS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": ({}, {}),
    "mesh": ({"data": 2, "fsdp": 2, "tensor": 2}, VARIANTS["scanned"] | {"model__remat": "dots"}),
}


@pytest.mark.parametrize("which", RUNS)
def test_a_traced_run_prints_parts_that_add_up_and_is_the_same_run(
    which: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh, knobs = RUNS[which]
    knobs = knobs | {"train__steps": 10, "train__eval_every": 5}
    numbers = profiled(store, tmp_path / "traced", "4:6", mesh, **knobs)
    said = capsys.readouterr().err
    if which == "plain":
        assert numbers == profiled(store, tmp_path / "untraced", None, mesh, **knobs)
    rows = table(said)
    whole = rows.pop("a step")
    assert whole[1] == 100 and whole[0] > 0
    for column, total in enumerate(whole):
        assert sum(row[column] for row in rows.values()) == pytest.approx(
            total, abs=0.06 * len(rows)
        )
    # Step 5 is followed by an evaluation.
    wanted = {"attention", "scores", "feedforward", "norm", "unembedding", "loss", "optimizer"}
    assert wanted | {"embedding", OTHER_PROGRAMS, NO_OPERATION} <= rows.keys()
    assert rows.keys() <= {*PARTS.values(), "other", OTHER_PROGRAMS, NO_OPERATION}
    assert len(list((tmp_path / "traced/profile/4-6").rglob("*.xplane.pb"))) == 1
    assert str(tmp_path / "traced/profile/4-6") in said.replace("\n", "")
    assert [p.name for p in (tmp_path / "traced/profile").iterdir()] == ["4-6"]


def test_a_run_that_ends_early_keeps_no_trace_and_goes_on_to_be_traced(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(store, train__steps=10, train__eval_every=5)
    with jax.set_mesh(tiny.mesh()):
        loop.train(config, tmp_path, until=6, profile=parse_steps("4:8"))
        assert "no trace was kept" in capsys.readouterr().err
        assert not list((tmp_path / "profile").iterdir())
        for steps in ("4:8", "5", "9:11"):  # step 5 was saved
            with pytest.raises(UserError, match="has made 5 of 10 steps; .* left: 6 to 10"):
                loop.train(config, tmp_path, profile=parse_steps(steps))
        loop.train(config, tmp_path, profile=parse_steps("10"))
        assert "time by part, steps 10 to 10" in capsys.readouterr().err
        assert [p.name for p in (tmp_path / "profile").iterdir()] == ["10-10"]
        with pytest.raises(UserError, match="has made 10 of 10 steps; .* left: none, it is done"):
            loop.train(config, tmp_path, profile=parse_steps("10"))
    assert not jax.config.values[NAMES_IN_KEY]


def test_a_full_disk_is_told_and_nothing_stays(small_disk: Path) -> None:
    filler = small_disk / "filler"
    with (
        Profiler(range(1, 2), 0, 5, small_disk) as profiler,
        pytest.raises(UserError, match=r"cannot write the trace .*/profile/1-1: .*No space left"),
    ):
        profiler.start(1, jax.numpy.ones(3))
        for _ in range(300):
            jax.block_until_ready(jax.numpy.ones(3) + 1)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        profiler.stop(1, None)
    assert list((small_disk / "profile").iterdir()) == []
    filler.unlink()
    with contextlib.suppress(RuntimeError):  # jax 0.10 still holds it, newer ones do not
        jax.profiler.stop_trace()


def test_the_command_refuses_wrong_steps_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--profile=13:10"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gptjax: --profile=13:10 is neither") and said.count("\n") == 1
