"""The report of a study, in files: Markdown, CSV, LaTeX, and a page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from gptjax.report import formats
from gptjax.report.formats import Table
from gptjax.report.page import definitions, document
from gptjax.storage import disk, replace_file
from gptjax.study import plots, tables
from gptjax.study.analysis import Analysis, environment
from gptjax.study.results import SAMPLE


def write(a: Analysis, folder: Path) -> None:
    """Writes the report's files, each whole or not at all; makes the folder.

    report.html, report.md    everything
    report.tex                the table of verdicts
    verdicts.csv              a row for each arm and scale
    report.csv                a row for each run

    Raises:
        UserError: if the folder cannot be written.
    """
    files = {
        "report.html": page(a),
        "report.md": markdown(a),
        "report.tex": formats.latex(tables.verdicts(a), caption(a)),
        "verdicts.csv": tables.verdicts_csv(a),
        "report.csv": tables.cells_csv(a),
    }
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(folder / name, text.encode())


def caption(a: Analysis) -> str:
    return ". ".join([f"{a.study.name}: {a.study.hypothesis.rstrip('.')}", *tables.stated(a.study)])


def sections(a: Analysis) -> Iterator[tuple[str, Table]]:
    """The tables after the verdicts that have something to say."""
    if a.changes:
        yield "From the first scale to the last", tables.changes(a)
    yield "Cost", tables.costs(a)
    if a.results.tuning:
        yield "Tuning", tables.tuning(a)
    for title, table in (
        ("What differs from the baseline", tables.differences(a)),
        ("Runs that did not finish", tables.unfinished(a)),
    ):
        if table.rows:
            yield title, table


def markdown(a: Analysis) -> str:
    def listed(lines: list[str]) -> str:
        return "\n".join(f"- {line}." for line in lines)

    parts = [
        f"# {a.study.name}",
        a.study.hypothesis,
        listed(tables.stated(a.study)),
        f"**{tables.summary(a)}**",
        formats.markdown(tables.verdicts(a)),
        listed(tables.warnings(a)),
    ]
    for title, table in sections(a):
        parts += [f"## {title}", formats.markdown(table)]
    parts += ["## How", listed(tables.method(a))]
    facts = environment(a.results)
    parts += ["## Made on", "\n".join(f"- {k}: {', '.join(v)}" for k, v in facts.items())]
    return "\n\n".join(filter(None, parts)) + "\n"


def page(a: Analysis) -> str:
    study = a.study
    body = [
        f"<h1>{escape(study.name)}</h1>",
        f"<p>{escape(study.hypothesis)}</p>",
        _paragraphs(tables.stated(study)),
        f"<h2>{escape(tables.summary(a))}</h2>",
        formats.html(tables.verdicts(a)),
        _paragraphs(tables.warnings(a)),
        "<h2>Differences and the zone that does not matter</h2>",
        '<p class="soft">Thick: Student\'s interval, thin: bootstrap. Filled marks are decided. '
        f"Shaded: within {study.smallest:g} {study.unit} of the baseline.</p>",
        plots.forest(a),
    ]
    for scale in study.scales:
        at = f", {escape(scale)}" if scale else ""
        body += [
            f"<h2>Learning curves{at}</h2>",
            '<p class="soft">Means over the runs that finished, with a band of one standard '
            "deviation; other runs are thin.</p>",
            plots.learning(a, scale),
        ]
        if picture := plots.differences(a, scale):
            body += [
                f"<h2>Difference along the run{at}</h2>",
                '<p class="soft">Arm less baseline, mean over pairs, with Student\'s interval at '
                "each point by itself. Points in mid-run stand before the learning rate's "
                "decay.</p>",
                picture,
            ]
    for cost, title in (("flops", "Loss against FLOPs"), ("seconds", "Loss against time")):
        if picture := plots.pareto(a, cost):
            legend = "Dashed, with filled marks: the front, which no arm beats in both."
            body += [f"<h2>{title}</h2>", f'<p class="soft">{legend}</p>', picture]
    for title, table in sections(a):
        body += [f"<h2>{title}</h2>", formats.html(table)]
    body += ["<h2>How</h2>", _paragraphs(tables.method(a)), *_samples(a)]
    facts = [(name, ", ".join(values)) for name, values in environment(a.results).items()]
    body += ["<h2>Made on</h2>", definitions(facts)]
    return document(f"Study {study.name}", body)


def _paragraphs(lines: list[str]) -> str:
    return "".join(f'<p class="soft">{escape(line)}.</p>' for line in lines)


def _samples(a: Analysis) -> Iterator[str]:
    samples = [
        (r, path)
        for r in a.rows
        for o in a.outcomes(r.scale, r.arm)
        if (path := o.folder / SAMPLE).is_file()
    ]
    if samples:
        yield "<h2>Samples</h2>"
    for r, path in samples:
        name = ", ".join(filter(None, (r.scale, r.arm)))
        text = path.read_text(encoding="utf-8", errors="replace")
        yield (
            f"<article><p><b>{escape(name)}</b></p>"
            f'<div class="text">{escape(text.strip())}</div></article>'
        )
