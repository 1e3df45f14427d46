"""What is known of a GPU without one: programs lowered for it, and experiments/peers/gpu.py.

Nothing here runs on a GPU, and no test says how fast one is.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from gptjax import accounting, configure, loop, sharding, state
from gptjax.cli import COMMANDS
from gptjax.config import Config
from gptjax.data.batches import Batch
from tests import tiny

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "peers"))
import gpu
import measure
import run

RECIPE = str(configure.RECIPES / "one_gpu.py")
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
BIASED = {name.replace("fmha", "fmhaScaleBias") for name in (FORWARD, BACKWARD)}


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax asks for the version of the installed cuDNN before it lowers; none is here."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91_000)


def lowered(config: Config, segmented: bool = False) -> str:
    """The training step for CUDA as StableHLO, of one device."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="cudnn"))
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        before, micro = state.abstract(config), config.train.accumulation
        shape = (config.data.batch_size // micro, micro, config.model.context)
        rows = NamedSharding(mesh, sharding.spec("BAT"))
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        batch = Batch(ids, ids, weights, *([ids, ids] if segmented else []))
        step: Any = state.make_train_step(config)
        return step.trace(before, batch).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> Counter[str]:
    """The custom calls of cuDNN, by their targets."""
    return Counter(re.findall(r"@(__cudnn\$\w+)", text))


@pytest.mark.parametrize("size, bodies", [("124m", 12), ("1558m", 1)])
def test_the_recipes_of_one_gpu_lower_with_fused_attention(
    size: str, bodies: int, cudnn: None
) -> None:
    config = configure.from_file(f"{RECIPE}:{size}")
    text = lowered(config)
    # A body that all layers share (1558m) is lowered once; `remat` keeps what the kernel yields.
    assert calls(text)[BACKWARD] == bodies
    assert set(calls(text)) == {FORWARD, BACKWARD}
    assert not re.search(r"x1024x1024x", text), "scores of all pairs are in memory"
    products = re.findall(r"dot_general.*-> tensor<[\dx]*x(\w+)>", text)
    assert set(products) == {"bf16", "f32"}  # float32 are those of the loss


@pytest.mark.parametrize("size", ["124m", "1558m"])
def test_the_recipes_fit_in_80_gb(size: str) -> None:
    """As estimated: a quarter is left for what is not counted, such as a second gradient."""
    config = configure.from_file(f"{RECIPE}:{size}", ["--config.model.attention=cudnn"])
    assert accounting.memory_bytes(config, {"data": 1, "fsdp": 1, "tensor": 1})["total"] < 60e9


SMALL = {
    "model__context": 64, "model__width": 32, "model__heads": 4, "model__dtype": "bfloat16",
    "model__layers": 2, "data__batch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "knobs, segmented, wanted",
    [
        ({"model__windows": "(16,None)"}, False, {FORWARD, BACKWARD}),
        ({"model__kv_heads": 2}, False, {FORWARD, BACKWARD}),
        ({"model__remat": "full", "model__scan_layers": True}, False, {FORWARD, BACKWARD}),
        # Documents of a packed row are a mask of all pairs, which the kernel adds as a bias.
        ({"data__packing": "masked"}, True, BIASED),
    ],
)
def test_the_kernel_has_windows_groups_and_documents(
    knobs: dict[str, Any], segmented: bool, wanted: set[str], text: Path, cudnn: None
) -> None:
    config = tiny.config(text, **SMALL, **knobs)
    program = lowered(config, segmented)
    assert set(calls(program)) == wanted
    if "model__windows" in knobs:
        windows = re.findall(r'sliding_window_length\\?22?"?: (\d+)', program)
        assert set(windows) == {"0", "16"}
    if "model__kv_heads" in knobs:  # keys and values are not repeated
        assert re.search(r"custom_call @__cudnn\$fmhaSoftmax\(.*2x64x2x8xbf16", program)


def test_xla_knows_the_options_of_a_step_and_those_of_the_user_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = loop.compiler_options("gpu", traced=True)
    assert {**loop.compiler_options("gpu"), "xla_gpu_enable_command_buffer": ""} == options
    program = jax.jit(lambda x: x + 1).lower(1.0)
    program.compile(compiler_options=options)
    with pytest.raises(Exception, match="No such compile option"):
        program.compile(compiler_options=options | {"xla_gpu_none": 1})
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert options.keys() - loop.compiler_options("gpu", traced=True).keys() == {
        "xla_gpu_enable_triton_gemm"
    }
    assert loop.compiler_options("cpu", traced=True) == {}


def test_products_in_fp8_are_products_of_8_bits_for_the_compiler(text: Path, cudnn: None) -> None:
    program = lowered(tiny.config(text, **SMALL, model__products="fp8"))
    pairs = re.findall(
        r"dot_general.*: \(tensor<[\dx]*x(f8\w+)>, tensor<[\dx]*x(f8\w+)>\)", program
    )
    # Of each layer's six matrices a product forward, and two backward with the gradient's grid.
    e4m3, e5m2 = "f8E4M3FN", "f8E5M2"
    assert Counter(frozenset(pair) for pair in pairs) == {
        frozenset({e4m3}): 2 * 6, frozenset({e4m3, e5m2}): 2 * 12,
    }  # fmt: skip


DOCUMENT = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
FLAGS = {*gpu.FLAGS.values(), *re.findall(r"--xla_gpu_\w+=\w*", DOCUMENT)}


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_the_flags_are_those_of_the_compiler(flag: str) -> None:
    name, _, value = flag.removeprefix("--").partition("=")
    option = json.loads(value) if value else value
    jax.jit(jnp.negative).lower(1.0).compile({name: option})
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(jnp.negative).lower(1.0).compile({f"{name}s": option})


# The script.


@pytest.mark.slow
def test_every_part_runs_with_tiny_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the knobs: those are the same with other configs, which the next test resolves."""
    answer, answers = measure.answer, {}

    def once(job: dict[str, Any]) -> Any:
        """What differs in an environment alone is not measured again within this process."""
        keys = ("task", "side", "shape", "overrides", "documents", "curve")
        key = json.dumps([job.get(k) for k in keys])
        if job["task"] == "prepare" or key not in answers:
            answers[key] = answer(job)
        return answers[key]

    monkeypatch.setattr(measure, "answer", once)
    parts = [part for part in gpu.PARTS if part != "knobs"]
    assert gpu.main(["--smoke", f"--out={tmp_path}", f"--parts={','.join(parts)}"]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    figures = {figure["figure"]: figure for figure in record["figures"]}
    assert len(figures) == len([figure for figure in gpu.FIGURES if figure.part in parts])
    torch = measure.answer({"task": "limits", "side": "PyTorch"} | limits_job())
    absent = {"nanoGPT"} | ({"PyTorch", "transformers"} if "absent" in torch else set())
    for name, figure in figures.items():
        expected = not any(side in name for side in absent)
        assert (figure["value"] is not None) == expected, figure
    # The same function from the same weights: what bfloat16 rounds differently, of a loss of 4.
    apart = figures["124M: loss after 20 steps minus plain PyTorch's"]["value"]
    assert apart is None or 0 <= abs(apart) < 4 * 2**-8
    # What is learned differs by less than the rounding of a number in fp8, 1 in 16.
    (curve,) = (r["losses"] for r in record["runs"] if r["name"] == f"{gpu.OURS} 500 steps")
    assert curve[-1] < curve[0] - 0.05
    difference = figures["fp8: largest difference of a loss in 500 steps"]["value"]
    assert 0 < difference < (curve[0] - curve[-1]) / 16
    assert not any(figure["target"] for figure in record["figures"])
    assert (tmp_path / "results.md").read_text().startswith("Tiny shapes")


@pytest.mark.parametrize("m", [m for part in gpu.PARTS.values() for m in part if m.knobs])
def test_what_is_varied_is_a_knob(m: gpu.Measurement) -> None:
    """Of a step that the recipe divides, and without the dtype and the biases of the others."""
    shape = gpu.SHAPES[m.subject] | (m.shape or {})
    job = {"shape": shape, "dtype": "bfloat16", "overrides": [f"--config.{k}" for k in m.knobs]}
    usual, config = measure.gptjax_config(job | {"overrides": []}), measure.gptjax_config(job)
    assert config != usual and shape["rows"] % config.train.accumulation == 0
    assert not config.model.bias and config.model.dtype == "bfloat16"
    # A micro-batch is the recipe's.
    if m.subject == "1558m" or "accumulation" in str(m.knobs):
        recipe = configure.from_file(f"{RECIPE}:{m.subject}")
        micro = recipe.data.batch_size // recipe.train.accumulation
        assert config.data.batch_size // config.train.accumulation == micro


def limits_job() -> dict[str, Any]:
    return {"device": "cpu", "dtype": "bfloat16", "seconds": 0.01, "matrix_side": 8}


def runs_of(numbers: dict[str, list[dict[str, Any]]]) -> gpu.Runs:
    return gpu.Runs({"part": "?", "name": n, **r} for n, rs in numbers.items() for r in rs)


RUNS = runs_of({
    "machine device gptjax": [{"peak, GFLOP/s": 1e6}],
    "machine limits jax": [{"memory read, GB/s": [2900, 3000, 3100]}],
    "machine limits PyTorch": [{"failed": "RuntimeError: no memory"}, {"memory read, GB/s": 2e3}],
    "124m prepare gptjax": [{"flops_per_token": 8e8, "parameters": 1.25e8}],
    "124m train gptjax": [
        {"tokens/s": [500e3, 510e3, 700e3], "first step, s": 60, "peak memory, MB": 30e3},
        {"tokens/s": 530e3, "first step, s": 20, "peak memory, MB": 32e3},
    ],
    "124m train nanoGPT": [
        {"tokens/s": 400e3, "first step, s": 30, "peak memory, MB": 40e3},
        {"tokens/s": 410e3, "first step, s": 25, "peak memory, MB": 40e3},
    ],
    "124m train plain PyTorch": [{"absent": "torch is not installed"}],
    "124m decode gptjax": [{"tokens/s, batch 1": 6000}],
    "124m train gptjax whole step": [{"tokens/s": 500e3}],
    "124m train gptjax whole step, Muon": [{"tokens/s": 480e3}],
    "124m train gptjax 500 steps": [{"losses": [3.0] * 500}],
    "124m train gptjax 500 steps, fp8": [{"losses": [3.5] + [3.0] * 449 + [3.25] * 50}],
})  # fmt: skip


@pytest.mark.parametrize(
    "what, value, met",
    [
        ("124M: tokens/s", 520e3, True),
        ("124M: MFU, %", 41.6, False),  # 520 thousand tokens of 0.8 GFLOP, of 1,000 TFLOP/s
        ("124M: times nanoGPT's tokens/s", (510 / 400 + 530 / 410) / 2, True),
        ("124M: times plain PyTorch's tokens/s", None, None),
        ("124M: peak memory, times nanoGPT's", (30 / 40 + 32 / 40) / 2, None),
        ("124M: time to the first step, cold, times nanoGPT's", 2.0, None),
        ("124M: decoding at batch 1, % of the bound", 50.0, True),  # 3 TB/s of 0.25 GB
        ("1558M: MFU, %", None, None),
        ("124M: Muon's step takes more than AdamW's, %", 100 / 24, True),
        ("fp8: mean difference of the losses, last 50 of 500 steps", 0.25, None),
        ("fp8: largest difference of a loss in 500 steps", 0.5, None),
    ],
)
def test_a_figure_is_of_what_was_measured(what: str, value: float | None, met: bool | None) -> None:
    (figure,) = [figure for figure in gpu.FIGURES if figure.what == what]
    told = gpu.judge(figure, RUNS)
    assert told["met"] is met
    assert told["value"] == (value if value is None else pytest.approx(value, rel=1e-12))
    if value is None:
        assert told["why"] in ("not measured", "torch is not installed")


def test_a_run_that_is_killed_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: list[str] = []

    def stand_in(job: dict[str, Any], cache: Path, limit: float) -> dict[str, Any]:
        names.append(f"{job['task']} {job['side']}")
        assert job["device"] == "cuda" and 0 < limit <= 300
        if job["task"] == "device":
            return {
                "device": "NVIDIA H100",
                "platform": "gpu",
                "peak, GFLOP/s": 1e6,
                "peak from": "?",
            }
        if job["task"] == "limits":
            return {"memory read, GB/s": 3e3} if job["side"] == "jax" else {"failed": "no memory"}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", stand_in)
    assert gpu.main([f"--out={tmp_path}"]) == 130
    assert names == ["device gptjax", "limits PyTorch", "limits jax", "prepare gptjax"]
    table = (tmp_path / "results.md").read_text()
    assert "on one NVIDIA H100" in table
    assert "| 124m | 124M: tokens/s | not measured | at least 500,000 |  |" in table.splitlines()
    assert "| machine limits PyTorch | failed no memory |" in table.splitlines()
    assert "interrupted" in capsys.readouterr().err


def test_each_subject_is_prepared_once_and_nothing_is_measured_again() -> None:
    names = [m.name for _, m in gpu.plan(list(gpu.PARTS))]
    for subject in ("124m", "1558m"):
        assert names.count(f"{subject} prepare gptjax") == 1
        first = next(n for n in names if n.startswith(subject))
        assert first == f"{subject} prepare gptjax"
    assert names.count("124m train gptjax") == 2  # the two rounds
    alone = [m.name for _, m in gpu.plan(["fp8", "knobs"])]
    assert alone.count("124m train gptjax") == 1
    assert set(alone) <= set(names)


def test_a_measurement_is_stopped_after_its_time(tmp_path: Path) -> None:
    job = limits_job() | {"task": "device", "side": "gptjax"}
    assert run.measure(job, tmp_path, limit=0.05) == {"failed": "stopped after 0 s"}


def test_without_a_gpu_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"device": "cpu", "platform": "cpu", "peak, GFLOP/s": 1.0, "peak from": "?"}
    monkeypatch.setattr(run, "measure", lambda *_: here)
    assert gpu.main([f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu: jax sees no GPU but 'cpu'") and said.count("\n") == 1


def test_the_commands_of_the_document_are_as_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They want a GPU: its script stops before it measures, a training run before it trains."""
    parts: list[list[str]] = []
    monkeypatch.setattr(gpu, "run_parts", lambda arguments: parts.append(arguments.parts) or 0)
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT/model.py").touch()
    shown = re.findall(r"^```sh\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    for words in (shlex.split(line, comments=True) for line in "".join(shown).splitlines()):
        if "experiments/peers/gpu.py" in words:
            options = [re.sub(r"^--(out|nanogpt)=.*/", rf"--\1={tmp_path}/", w) for w in words[2:]]
            assert gpu.main(options) == 0, words
        elif "launch.py" in words:
            command, *options = words[words.index("launch.py") + 1 :]
            recipe, *overrides = (w for w in options if w.startswith("--config"))
            configure.from_file(recipe.removeprefix("--config="), overrides)
            assert command in COMMANDS
    # What a loan is split into is all that there is, and the table says what.
    assert len(parts) == 5
    assert {part for some in parts[2:] for part in some} == set(gpu.PARTS)
    table = DOCUMENT.partition("## Training")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(gpu.PARTS)
