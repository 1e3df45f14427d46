"""An evaluation or a comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from gptjax.audit import plots
from gptjax.audit.compare import PASSAGES, Pieces, align, passages, text_of
from gptjax.audit.measure import Scored
from gptjax.audit.run import Audit
from gptjax.audit.table import HEADINGS, convention, interval, notes, number, rows
from gptjax.config import UserError

SHOWN_TOKENS = 2000  # of each text, coloured
LEVELS = 10  # shades; a shade is a nat

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5d6573; --line: #dcdcd6; }
* { box-sizing: border-box; }
body { margin: 0; background: #fbfaf7; color: var(--ink);
  font: 16px/1.55 Charter, "Iowan Old Style", Georgia, "Noto Serif", "Noto Serif CJK SC", serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { margin: .3rem 0 .8rem; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums lining-nums; width: 100%; }
th { font-weight: 600; font-size: .82rem; color: var(--soft); vertical-align: bottom; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small, th small { display: block; color: var(--soft); }
td.in { padding-left: 1.2rem; color: var(--soft); }
td.told { white-space: normal; } td.told, th.told { text-align: left; }
.dense th, .dense td { padding: .35rem .45rem; font-size: .88rem; } .dense small { font-size: .9em; }
svg { max-width: 100%; height: auto; font-family: system-ui, sans-serif; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #fff; padding: 1rem 1.2rem;
  border: 1px solid var(--line); border-radius: 6px; line-height: 1.8; }
.text span { border-radius: 2px; } .text span:hover { outline: 1px solid var(--ink); }
.end { color: var(--soft); font-size: .75rem; }
.key span { display: inline-block; padding: 0 .55rem; font-size: .82rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; }
article { margin: 0 0 1.1rem; } article p { margin: 0 0 .25rem; }
"""
# s0 .. s9: ever less expected. a1 .. a9: A is better; b1 .. b9: B is.
SHADES = "".join(
    f".s{i} {{ background: rgb(226 88 34 / {i / LEVELS * 0.85:.3f}); }}"
    f".a{i} {{ background: rgb(34 107 160 / {i / LEVELS * 0.75:.3f}); }}"
    f".b{i} {{ background: rgb(77 124 15 / {i / LEVELS * 0.75:.3f}); }}"
    for i in range(LEVELS)
)


def write(path: Path, page: str) -> None:
    """Writes a page; its folder must be there."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --html={path}: {error.strerror or error}") from error


def page(record: dict[str, Any], found: Audit) -> str:
    """The page of an evaluation: `run.record`, with plots and the texts coloured by surprise."""
    lines = rows(record)
    texts = {name: s["by_position"] for name, s in record["scores"].items() if "by_position" in s}
    body = [
        f"<h1>Perplexity of {escape(found.workdir)}, step {found.step:,}</h1>",
        f'<p class="soft">{escape(convention(record))}</p>',
        _table(lines),
        *(f'<p class="soft">{escape(note)}.</p>' for note in notes(record)),
    ]
    if len(lines) > 1:
        body += ["<h2>Bits per byte</h2>", plots.intervals(lines)]
    body += ["<h2>Loss by position</h2>", plots.by_position(texts)]
    for name, scored in found.scored.items():
        shown = min(SHOWN_TOKENS, len(scored.nats_I))
        rest = f"The first {shown:,} of {len(scored.nats_I):,} tokens"
        body += [
            f"<h2>What surprised it in {escape(name)}</h2>",
            f'<p class="soft">{rest if shown < len(scored.nats_I) else "The whole text"}. '
            "The darker, the less expected; the pointer shows a token's nats.</p>",
            _key([(f"s{i}", f"{i}{'+' * (i == LEVELS - 1)}") for i in range(LEVELS)], "nats"),
            f'<div class="text">{"".join(_surprise(scored, shown))}</div>',
        ]
    body += ["<h2>What was measured</h2>", definitions(_model(record) + _texts(record["scores"]))]
    return document(f"Perplexity of {found.workdir}", body)


def comparison_page(record: dict[str, Any], a: Audit, b: Audit) -> str:
    """The page of a comparison: `compare.compare`, with each text's most telling passages."""
    body = [
        "<h1>Two models on the same text</h1>",
        f"<p>A is {escape(a.workdir)}, step {a.step:,}; B is {escape(b.workdir)}, step "
        f"{b.step:,}. A difference below 0 says that B is better.</p>",
        _differences(record["texts"]),
    ]
    for name, t in record["texts"].items():
        d = t["bits_per_byte"]
        better = t["documents_better"]
        body += [
            f'<p class="soft">{escape(name)}: interval {escape(t["interval_by"])}. A is better on '
            f"{better['a']:,}, B on {better['b']:,} of {t['documents']:,} documents.</p>"
        ]
        if t["documents"] > 1:
            body.append(
                plots.documents(t["bits_per_byte_of_documents"], d["interval"], d["difference"])
            )
        pieces = align(a.scored[name], b.scored[name])
        body += [
            f"<h2>Where {escape(name)} makes the difference</h2>",
            f'<p class="soft">The {PASSAGES} stretches with the largest differences, each with its '
            "share of all differences (taken as absolute values). Colours stand for nats.</p>",
            _key(
                [(f"a{i}", f"A {i}") for i in range(LEVELS - 1, 0, -2)]
                + [(f"b{i}", f"B {i}") for i in range(1, LEVELS, 2)],
                "nats better",
            ),
            *_passages(a.scored[name], pieces),
        ]
    facts = [(f"{side.upper()}: {k}", v) for side in "ab" for k, v in _model(record[side])]
    body += ["<h2>What was measured</h2>", definitions(facts + _texts(record["texts"]))]
    return document("Two models on the same text", body)


def _surprise(scored: Scored, shown: int) -> Iterator[str]:
    """Spans of whole characters: tokens that share a character share a span."""
    ids, nats = scored.targets_I[:shown].tolist(), scored.nats_I[:shown].tolist()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, held = "", []
    for i, (token, cost) in enumerate(zip(ids, nats, strict=True)):
        if token == scored.tokenizer.eot:
            yield f'<span class="end {_shade(cost)}" title="{cost:.2f} nats">end of text</span>\n'
            continue
        held.append(cost)
        text += decoder.decode(scored.tokenizer.decode_bytes([token]), final=i == shown - 1)
        if decoder.getstate()[0]:
            continue  # within a character
        told = " + ".join(f"{c:.2f}" for c in held)
        yield _span(_shade(sum(held)), f"{text!r}: {told} nats", text)
        text, held = "", []


def _passages(a: Scored, pieces: Pieces) -> Iterator[str]:
    found = passages(pieces)
    every = sum(abs(p.nats) for p in found) or 1.0
    for p in found[:PASSAGES]:
        spans = []
        for i in range(p.start, p.stop):
            nats = float(pieces.difference[i])
            side, text = "ab"[nats < 0], text_of(a, pieces, i, i + 1)
            told = f"A {pieces.nats_a[i]:.2f}, B {pieces.nats_b[i]:.2f} nats"
            spans.append(_span(f"{side}{min(round(abs(nats)), LEVELS - 1)}", told, text or "⏹"))
        better = "B" if p.nats < 0 else "A"
        yield (
            f"<article><p><b>{better} better by {abs(p.nats):.2f} nats</b> "
            f'<span class="soft">({abs(p.nats) / every:.1%}), document {pieces.document[p.start]}, '
            f"byte {pieces.offset[p.start]:,}</span></p>"
            f'<div class="text">{"".join(spans)}</div></article>'
        )


def _span(shade: str, title: str, text: str) -> str:
    return f'<span class="{shade}" title="{escape(title)}">{escape(text)}</span>'


def _shade(nats: float) -> str:
    return f"s{min(int(nats), LEVELS - 1)}"


def _key(shades: list[tuple[str, str]], unit: str) -> str:
    spans = "".join(f'<span class="{name}">{label}</span>' for name, label in shades)
    return f'<p class="key">{spans} <span class="soft">{unit}</span></p>'


def _table(lines: list[tuple[str, dict[str, Any]]]) -> str:
    counts = ("documents", "tokens", "words", "bytes")
    head = "".join(f"<th>{h}</th>" for h in ("text", *counts, *HEADINGS.values()))
    body = []
    for name, s in lines:
        cells = [f"<td>{s[c]:,}</td>" for c in counts]
        cells += [
            f"<td>{number(s[f])}<small>{interval(s['interval'][f])}</small></td>" for f in HEADINGS
        ]
        indent = ' class="in"' if name.startswith("  ") else ""
        body.append(f"<tr><td{indent}>{escape(name.strip())}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _differences(texts: dict[str, Any]) -> str:
    headings = ("text", "figure", "A", "B", "B − A", "95% interval")
    body = []
    for name, t in texts.items():
        told = [(name, HEADINGS[f], t[f]) for f in ("bits_per_byte", "loss") if f in t]
        told += [(f"  {n}", HEADINGS["bits_per_byte"], d) for n, d in t["by_domain"].items()]
        for label, figure, d in told:
            indent = ' class="in"' if label.startswith("  ") else ""
            values = "".join(
                f"<td>{number(d.get(k)) if k in d else ''}</td>" for k in ("a", "b", "difference")
            )
            body.append(
                f"<tr><td{indent}>{escape(label.strip())}</td><td>{figure}</td>{values}"
                f"<td>{interval(d['interval'])}</td></tr>"
            )
    head = "".join(f"<th>{h}</th>" for h in headings)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _model(identity: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("model", f"{identity['workdir']}, step {identity['step']:,}"),
        ("parameters", f"{identity['parameters']:,}, sha256 {identity['model_sha256']}"),
        ("tokenizer", f"{identity['tokenizer']}, sha256 {identity['tokenizer_sha256']}"),
        ("convention", convention(identity)),
    ]


def _texts(texts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"text {name}", f"{t['source']}, sha256 {t['text_sha256']}{_detokenized(t)}")
        for name, t in texts.items()
        if "text_sha256" in t
    ]


def _detokenized(text: dict[str, Any]) -> str:
    if text.get("detokenizer", "none") == "none":
        return ""
    return f", after de-tokeniser {text['detokenizer']} (words and bytes are those before it)"


def definitions(facts: list[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd><code>{escape(v)}</code></dd>" for k, v in facts)
    return f"<dl>{items}</dl>"


def document(title: str, body: list[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{SHADES}</style></head>"
        f"<body><main>{chr(10).join(body)}</main></body></html>\n"
    )
