"""What a study's report says of known results: verdicts, steps, fronts, and every run's fate."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import configure
from gptjax.config import UserError
from gptjax.layers.feedforward import FEEDFORWARD
from gptjax.report import formats
from gptjax.study import publish, statistics, tables
from gptjax.study.analysis import Reach, analyse, crossing, environment, front
from gptjax.study.results import Outcome, Results
from gptjax.study.spec import TUNING, Cell, Study
from tests import tiny
from tests.test_evaluation_pages import Page

STEPS = np.array([0, 100, 200, 300, 400])
# Held-out loss of the baseline at the end, by seed: what the pairs have in common.
SEEDS = np.array([2.00, 2.03, 1.98, 2.05, 1.96])
WOBBLE = np.array([-2, -1, 0, 1, 2]) * 1e-3  # of differences, from seed to seed
NASTY = 'a_b & <50%> "#1" ~^{x}\\'


@pytest.fixture(scope="module")
def configured():
    """Configs by their (knob, value)s; nothing reads the data that they name."""
    base = configure.from_file(tiny.RECIPE, tiny.overrides(Path("nowhere"), train__steps=400))
    return functools.cache(
        lambda knobs: configure.override(base, [f"--config.{k}={v}" for k, v in knobs])
    )


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """No test here is of the bootstrap."""
    monkeypatch.setattr(statistics, "RESAMPLES", 99)


@pytest.fixture
def make(configured, tmp_path):
    """Makes an outcome: `final` is the metric at the end of a line that falls by 1 in 400 steps."""

    def outcome(arm: str, seed: int, final: float, status="finished", scale="", **more) -> Outcome:
        changed = configured(tuple(more.pop("knobs", {}).items()))
        changed = dataclasses.replace(changed, seed=more.pop("run_seed", seed))
        cell = Cell(scale, arm, seed, changed, {})
        known = math.nan if status != "finished" else float(final)
        curve = (STEPS, final + 1 - STEPS / 400) if status != "missing" else (STEPS[:0], STEPS[:0])
        given = {"reason": "", "speed": 1000.0} | more
        return Outcome(
            cell, tmp_path / cell.address, status, given["reason"], known, curve,
            given["speed"], 3.0, 5e6,
        )  # fmt: skip

    return outcome


def study(*arms: str, **fields) -> Study:
    return Study("It <helps>.", tiny.RECIPE, {arm: {} for arm in arms}, **fields)


def runs(make, gaps: dict[str, float], scale: str = "", **more) -> list[Outcome]:
    """Five finished runs of the baseline, and of arms that are so much above it on average."""
    found = [make("base", i, final, scale=scale) for i, final in enumerate(SEEDS)]
    for arm, gap in gaps.items():
        finals = enumerate(SEEDS + gap + WOBBLE)
        found += [make(arm, i, final, scale=scale, **more) for i, final in finals]
    return found


def replaced(found: list[Outcome], arm: str, seed: int, **fields) -> list[Outcome]:
    return [
        dataclasses.replace(o, **fields) if (o.cell.arm, o.cell.seed) == (arm, seed) else o
        for o in found
    ]


DIVERGED = {"status": "diverged", "metric": math.nan, "reason": "no finite gradient at step 37"}
FAILED = {"status": "failed", "metric": math.nan, "reason": "the disk is full"}
MISSING = {"status": "missing", "metric": math.nan}


def test_verdicts_by_row(make):
    gaps = {"good": -0.1, "bad": 0.25, "alike": 0.001}
    found = analyse(Results(study(*gaps), runs(make, gaps), [], {}))
    told = [
        (r.arm, r.verdict, r.words, round(r.difference, 9), r.counts["finished"], r.preliminary)
        for r in found.rows
    ]
    assert told == [
        ("base", "", "", 0.0, 5, False),
        ("good", "better", "better", -0.1, 5, False),
        ("bad", "worse", "worse", 0.25, 5, False),
        ("alike", "no difference", "no difference larger than 0.01", 0.001, 5, False),
    ]
    assert tables.summary(found) == "1 better, 1 worse, 1 no difference of 3 comparisons"
    row = dict(zip(tables.verdicts(found).headings, tables.verdicts(found).rows[1], strict=True))
    # Student's interval of -0.1 + WOBBLE: sd sqrt(2.5) * 1e-3, t(4) = 2.776.
    half = 2.7764451 * math.sqrt(2.5 / 5) * 1e-3
    low, high = -0.1 - half, -0.1 + half
    assert row["difference\nnats/token, 95%"] == f"-0.1000\n[{low:+.4f}, {high:+.4f}]"
    assert row["nats/token\n± sd"] == "1.9040\n± 0.0361"
    assert row["in steps"] == "there at step 360 of 400"
    assert row["runs"] == "5 of 5"
    # Pairs share all of the noise but WOBBLE.
    assert found.row("", "good").pairing < 0.01
    assert "median" in next(line for line in tables.method(found) if "Variance" in line)


def test_the_family_is_all_arms_at_all_scales(make):
    scales = {"small": {}, "large": {}}
    one = analyse(Results(study("good"), runs(make, {"good": -0.1}), [], {}))
    both = [o for scale in scales for o in runs(make, {"good": -0.1}, scale)]
    two = analyse(Results(study("good", scales=scales), both, [], {}))
    p = one.row("", "good").comparison.p_holm
    assert two.row("small", "good").comparison.p_holm == pytest.approx(2 * p)


def test_steps_are_read_off_the_curve_that_is_lower(make):
    # Lines that fall by 1 / 400 a step: an arm 0.25 above ends where the baseline was 100 earlier.
    found = analyse(Results(study("bad", "good"), runs(make, {"bad": 0.25, "good": -0.1}), [], {}))
    assert found.row("", "bad").reach == ("baseline", pytest.approx(300), 400)
    assert found.row("", "good").reach == ("arm", pytest.approx(360), 400)
    assert isinstance(found.row("", "bad").reach, Reach)
    # An arm that ends above the baseline's first point cannot be placed on its curve.
    assert analyse(Results(study("lost"), runs(make, {"lost": 1.5}), [], {})).rows[1].reach is None


@pytest.mark.parametrize(
    "loss, level, step",
    [
        ([3, 2, 1], 2.5, 5),
        ([3, 2, 1], 1.75, 12.5),
        ([3, 2, 1], 1, 20),
        ([3, 2, 1], 3, 0),  # just there at the first point
        ([3, 2, 1], 3.1, None),  # before the first point
        ([3, 2, 1], 0.9, None),
        ([3, 1, 2, 0], 1.5, 7.5),  # the first time counts
    ],
)
def test_crossing(loss, level, step):
    steps = 10 * np.arange(len(loss))
    assert crossing(steps, np.array(loss, float), level) == (step and pytest.approx(step))


def test_a_diverged_run_is_told_and_nothing_claimed(make):
    outcomes = replaced(runs(make, {"wild": -0.1, "good": -0.1}), "wild", 3, **DIVERGED)
    found = analyse(Results(study("wild", "good"), outcomes, [], {}))
    row = found.row("", "wild")
    assert (row.verdict, row.words) == ("diverged", "diverged 1 of 5")
    assert not row.preliminary
    assert row.comparison.p_holm == 1 and row.reach is None
    assert row.difference == pytest.approx(-0.1 - 0.25e-3)  # the others' is still shown
    assert found.row("", "good").verdict == "better"
    assert not any(row.on_front.values())
    for text in (publish.page(found), publish.markdown(found)):
        assert "diverged 1 of 5" in text and "no finite gradient at step 37" in text
        assert outcomes[8].cell.address in text


def test_a_baseline_that_diverged_decides_nothing(make):
    outcomes = runs(make, {"stable": -0.1})
    for seed in (0, 1):
        outcomes = replaced(outcomes, "base", seed, **DIVERGED)
    row = analyse(Results(study("stable"), outcomes, [], {})).row("", "stable")
    assert row.verdict == "baseline diverged"
    assert row.words == "finished 5 of 5; the baseline diverged 2 of 5"
    both = replaced(outcomes, "stable", 4, **DIVERGED)
    row = analyse(Results(study("stable"), both, [], {})).row("", "stable")
    assert row.words == "diverged 1 of 5; the baseline diverged 2 of 5"


@pytest.mark.parametrize("arm", ["good", "base"])
def test_a_verdict_is_preliminary_while_runs_lack(make, arm):
    outcomes = replaced(runs(make, {"good": -0.1, "bad": 0.1}), arm, 2, **FAILED)
    found = analyse(Results(study("good", "bad"), outcomes, [], {}))
    row = found.row("", "good")
    assert row.preliminary and row.words == "preliminary, 4 of 5 pairs: better"
    assert found.row("", "bad").preliminary == (arm == "base")
    assert "Preliminary: 14 of 15 runs have ended" in tables.warnings(found)[0]
    assert "the disk is full" in publish.markdown(found)
    cells = list(tables.runs(found.study, found.row("", arm)).split("\n"))
    assert cells == ["4 of 5", "(1 failed)"]


def test_the_gain_from_scale_to_scale(make):
    scales = {"small": {}, "large": {}}
    early = runs(make, {"fades": -0.1, "stays": -0.1, "breaks": -0.1}, "small")
    late = runs(make, {"fades": -0.02, "stays": -0.101, "breaks": -0.1}, "large")
    outcomes = [*early, *replaced(late, "breaks", 0, **DIVERGED)]
    found = analyse(Results(study("fades", "stays", "breaks", scales=scales), outcomes, [], {}))
    told = [row[:2] for row in tables.changes(found).rows]
    assert told == [
        ("fades", "shrinks"),
        ("stays", "holds"),
        ("breaks", "cannot be told: runs diverged"),
    ]
    assert found.changes["fades"].change == pytest.approx(-0.08)
    assert tables.changes(found).rows[0][2:4] == ("+0.1000", "+0.0200")
    page = publish.page(found)
    assert "shrinks" in page and "Learning curves, large" in page


def test_tuning_is_told_with_its_edge(make):
    """The arm's best is the greatest that was tried; another diverged at both, and says so."""
    tuned = study("arm", "wild", seeds=3, tune={"optim.peak_lr": (1e-3, 1e-2)})
    tries = []
    for arm, losses in {"base": (2.0, 2.1), "arm": (1.9, 1.8), "wild": (9, 9)}.items():
        for rate, loss in zip((1e-3, 1e-2), losses, strict=True):
            knobs = {"optim.peak_lr": rate} | ({"model.qk_norm": True} if arm != "base" else {})
            status = "diverged" if arm == "wild" else "finished"
            o = make(arm, 0, loss, status, knobs=knobs, run_seed=TUNING)
            tries.append((o, {"optim.peak_lr": rate}))
    best = {("", "base"): {"optim.peak_lr": 1e-3}, ("", "arm"): {"optim.peak_lr": 1e-2}}
    outcomes = [
        make(arm, i, SEEDS[i] + gap + WOBBLE[i] * (arm == "arm"), knobs=knobs)
        for arm, gap, knobs in (
            ("base", 0, {"optim.peak_lr": 1e-3}),
            ("arm", -0.1, {"optim.peak_lr": 1e-2, "model.qk_norm": True}),
        )
        for i in range(3)
    ]
    found = analyse(Results(tuned, outcomes, tries, best))
    assert found.row("", "arm").edge == ["optim.peak_lr"]
    assert [row[-1] for row in tables.tuning(found).rows[2:4]] == [
        "",
        "chosen, at the edge of optim.peak_lr",
    ]
    assert any(
        "arm: the best optim.peak_lr (0.01) lies at the edge" in w for w in tables.warnings(found)
    )
    assert found.row("", "arm").differs == {
        "model.qk_norm": (False, True),
        "optim.peak_lr": (1e-3, 1e-2),
    }
    wild = found.row("", "wild")
    assert (wild.verdict, wild.preliminary) == ("diverged", False)
    assert wild.words == "diverged at every value that was tried"
    assert wild.differs == {"model.qk_norm": (False, True)}
    assert wild.counts["missing"] == 3
    # While tuning goes on an arm has no runs, and the page is written all the same.
    tries[3] = dataclasses.replace(tries[3][0], **MISSING), tries[3][1]
    early = analyse(Results(tuned, [], tries, {("", "base"): best["", "base"]}))
    assert early.row("", "arm").preliminary and early.row("", "arm").verdict == "undecided"
    assert "preliminary, 0 of 3 pairs" in publish.markdown(early)


def test_cost_is_told_beside_the_baseline(make):
    outcomes = runs(make, {"wide": -0.1}, knobs={"model.ff_dim": 128}, speed=500.0)
    found = analyse(Results(study("wide"), outcomes, [], {}))
    base, wide = found.rows
    # Two matrices, 16 wide, go from 64 to 128 inner units; 8 rows of 16 tokens.
    assert wide.cost.parameters - base.cost.parameters >= 2 * 16 * 64
    assert wide.cost.flops_per_token - base.cost.flops_per_token == 6 * 2 * 16 * 64
    assert base.cost.tokens == 400 * 8 * 16
    assert base.cost.flops == base.cost.tokens * base.cost.flops_per_token
    assert (base.cost.seconds, wide.cost.seconds) == (51.2, 102.4)
    assert wide.cost.over(base.cost).tokens_per_second == 0.5
    assert [r.on_front for r in found.rows] == [{"flops": True, "seconds": True}] * 2
    row = dict(zip(tables.costs(found).headings, tables.costs(found).rows[1], strict=True))
    assert row["tokens/s"] == "500\n(0.5×)" and row["program\nMB"] == "5.0\n(1×)"
    assert row["front"] == "FLOPs, time"


def test_a_model_that_cannot_be_counted_is_reported_all_the_same(make, monkeypatch):
    monkeypatch.setitem(FEEDFORWARD, "either", tiny.UNCOUNTABLE)
    outcomes = runs(make, {"arm": -0.1}, knobs={"model.feedforward": "either"})
    found = analyse(Results(study("arm"), outcomes, [], {}))
    assert [math.isnan(r.cost.flops) for r in found.rows] == [False, True]
    assert [r.on_front["flops"] for r in found.rows] == [True, False]
    shown = tables.verdicts(found), tables.costs(found)
    base, arm = (dict(zip(s.headings, s.rows[1], strict=True)) for s in shown)
    assert base["verdict"] == "better" and base["FLOPs"] == arm["FLOPs"] == tables.MISSING
    assert "nan" not in publish.markdown(found)


POINTS = st.lists(
    st.tuples(*[st.one_of(st.integers(0, 4), st.just(math.nan))] * 2), min_size=1, max_size=9
)


@given(POINTS)
def test_the_front_is_what_none_beats(points):
    def beats(a, b):
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    known = [p for p in points if not any(map(math.isnan, p))]
    expected = [p in known and not any(beats(other, p) for other in known) for p in points]
    assert front(*zip(*points, strict=True)) == expected


@pytest.fixture
def nasty(make):
    """A study whose names every format would trip over, with a run of each status."""
    gaps = {NASTY: -0.1, "[/b]:x: | *c*": 0.1}
    outcomes = replaced(runs(make, gaps), NASTY, 0, **DIVERGED)
    outcomes = replaced(outcomes, "[/b]:x: | *c*", 0, **FAILED)
    outcomes = replaced(outcomes, "[/b]:x: | *c*", 1, **MISSING)
    outcomes = replaced(outcomes, "[/b]:x: | *c*", 2, status="started", metric=math.nan)
    for o in outcomes[:1]:
        o.folder.mkdir()
        (o.folder / "sample.txt").write_text("To be <b>or</b> not & so on")
        made = {
            "code": "c0de", "versions": {"jax": "0.10"}, "python": "3.11", "platform": "Linux",
            "cpu": "", "devices": {"cpu": 2}, "fingerprints": {"held_out.text": "f1"},
            "xla_flags": "", "git": {"revision": "abc", "dirty": True},
        }  # fmt: skip
        (o.folder / "environment.json").write_text(json.dumps([made]))
    return analyse(Results(study(*gaps, name="no_1"), outcomes, [], {}))


def test_what_the_runs_were_made_on(nasty):
    assert environment(nasty.results) == {
        "code": ["c0de"],
        "version of jax": ["0.10"],
        "python": ["3.11"],
        "platform": ["Linux"],
        "devices": ["2 x cpu"],
        "data held_out.text": ["f1"],
        "git revision": ["abc, changed"],
    }


def test_the_page_is_whole_and_asks_for_nothing(nasty):
    html = publish.page(nasty)
    page = Page(html)  # tags nest
    assert all(address.startswith("#") for address in page.loaded), page.loaded
    assert not page.tags & {"script", "link", "img", "iframe", "object", "i"}
    assert "http" not in html
    assert html.count("<svg") == 5  # forest, curves, differences, and two of cost
    for escaped in (
        "a_b &amp; &lt;50%&gt; &quot;#1&quot; ~^{x}\\",
        "[/b]:x: | *c*",
        "It &lt;helps&gt;.",
    ):
        assert escaped in html
    assert "<50%>" not in html and "<helps>" not in html
    assert "To be &lt;b&gt;or&lt;/b&gt; not &amp; so on" in html
    assert "c0de" in html and "held_out.text" in html
    assert html == publish.page(nasty)


def test_csv_reads_back(nasty, tmp_path):
    publish.write(nasty, tmp_path / "out" / "deep")
    assert {p.name for p in (tmp_path / "out/deep").iterdir()} == {
        "report.html", "report.md", "report.tex", "report.csv", "verdicts.csv",
    }  # fmt: skip
    with (tmp_path / "out/deep/report.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 15
    for cell, o in zip(cells, nasty.results.outcomes, strict=True):
        assert (cell["arm"], cell["status"], cell["reason"]) == (o.cell.arm, o.status, o.reason)
        assert cell["seed"] == str(o.cell.config.seed) and cell["address"] == o.cell.address
        assert cell["value"] == ("" if math.isnan(o.metric) else repr(o.metric))
    with (tmp_path / "out/deep/verdicts.csv").open(newline="") as file:
        verdicts = list(csv.DictReader(file))
    assert [v["arm"] for v in verdicts] == ["base", NASTY, "[/b]:x: | *c*"]
    counts = [
        [v[k] for k in ("finished", "diverged", "failed", "started", "missing")] for v in verdicts
    ]
    assert counts == [list("50000"), list("41000"), list("20111")]
    assert float(verdicts[2]["difference"]) == nasty.rows[2].difference
    assert [v["preliminary"] for v in verdicts] == ["False", "False", "True"]


def test_a_report_that_cannot_be_written_is_told(nasty, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        publish.write(nasty, tmp_path / "file" / "out")


def test_latex_is_escaped():
    escaped = formats.escape_latex(NASTY)
    assert escaped == (
        r"a\_b \& \textless{}50\%\textgreater{} \textquotedbl{}\#1\textquotedbl{} "
        r"\textasciitilde{}\textasciicircum{}\{x\}\textbackslash{}"
    )
    # A minus is one, a dash between words is not; nothing begins a row like an argument of \\.
    assert formats.escape_latex("-0.1\n[-0.2, +0.1] pre-1 *") == (
        r"$-$0.1 {[}$-$0.2, +0.1] pre-1 {*}"
    )


def test_latex_is_a_table(nasty):
    text = formats.latex(tables.verdicts(nasty), publish.caption(nasty))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"\\begin\{tabular\}\{(.*)\}", text)[1]
    assert len(rows) == 4
    letters = re.sub(r"p\{[^}]*\}", "p", columns)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(letters) - 1}


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_compiles(nasty, tmp_path):
    table = formats.latex(tables.verdicts(nasty), publish.caption(nasty))
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}"
    (tmp_path / "a.tex").write_text(f"{head}\\begin{{document}}\n{table}\\end{{document}}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


def test_markdown_rows_have_their_cells(nasty):
    lines = formats.markdown(tables.verdicts(nasty)).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(lines[1].split("|")) - 1}
    assert r"[/b]:x: \| \*c\*" in lines[4]


def test_the_terminal_shows_every_arm(nasty, capsys):
    tables.show(nasty)
    out = capsys.readouterr().out
    assert (
        "[/b]:x: | *c*" in out and "diverged 1 of 5" in out and "preliminary, 2 of 5 pairs" in out
    )
    assert all(status in out for status in ("failed", "started", "missing"))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.slow
def test_a_browser_shows_the_page(nasty, tmp_path):
    publish.write(nasty, tmp_path / "out")
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            f"file://{tmp_path / 'out/report.html'}",
        ],
        capture_output=True,
        timeout=120,
    )  # fmt: skip
    dom, log = done.stdout.decode(), done.stderr.decode()
    assert dom.count("<svg") == 5 and "diverged 1 of 5" in dom and dom.rstrip().endswith("</html>")
    assert "CONSOLE" not in log, log
