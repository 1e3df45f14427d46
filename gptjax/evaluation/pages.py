"""An evaluation or a comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from html import escape
from typing import Any

from gptjax.evaluation import charts
from gptjax.evaluation.audit import Audit
from gptjax.evaluation.compare import PASSAGES, Pieces, align, passages, text_of
from gptjax.evaluation.measure import Scored
from gptjax.evaluation.summary import convention, differences, notes, rows, scores
from gptjax.report.formats import html
from gptjax.report.page import definitions, document

SHOWN_TOKENS = 2000  # of each text, coloured
LEVELS = 10  # shades; a shade is a nat

# s0 .. s9: ever less expected. a1 .. a9: A is better; b1 .. b9: B is.
SHADES = "".join(
    f".s{i} {{ background: rgb(226 88 34 / {i / LEVELS * 0.85:.3f}); }}"
    f".a{i} {{ background: rgb(34 107 160 / {i / LEVELS * 0.75:.3f}); }}"
    f".b{i} {{ background: rgb(77 124 15 / {i / LEVELS * 0.75:.3f}); }}"
    for i in range(LEVELS)
)


def page(record: dict[str, Any], audit: Audit) -> str:
    """The page of an evaluation: `run.record`, with plots and the texts coloured by surprise."""
    lines = rows(record)
    texts = {name: s["by_position"] for name, s in record["scores"].items() if "by_position" in s}
    body = [
        f"<h1>Perplexity of {escape(audit.workdir)}, step {audit.step:,}</h1>",
        f'<p class="soft">{escape(convention(record))}</p>',
        html(scores(record)),
        *(f'<p class="soft">{escape(note)}.</p>' for note in notes(record)),
    ]
    if len(lines) > 1:
        body += ["<h2>Bits per byte</h2>", charts.intervals(lines)]
    body += ["<h2>Loss by position</h2>", charts.by_position(texts)]
    for name, scored in audit.scored.items():
        shown = min(SHOWN_TOKENS, len(scored.nats_I))
        extent = f"The first {shown:,} of {len(scored.nats_I):,} tokens"
        body += [
            f"<h2>What surprised it in {escape(name)}</h2>",
            f'<p class="soft">{extent if shown < len(scored.nats_I) else "The whole text"}. '
            "The darker, the less expected; the pointer shows a token's nats.</p>",
            _key([(f"s{i}", f"{i}{'+' * (i == LEVELS - 1)}") for i in range(LEVELS)], "nats"),
            f'<div class="text">{"".join(_surprise(scored, shown))}</div>',
        ]
    body += ["<h2>What was measured</h2>", definitions(_model(record) + _texts(record["scores"]))]
    return document(f"Perplexity of {audit.workdir}", body, SHADES)


def comparison_page(record: dict[str, Any], a: Audit, b: Audit) -> str:
    """The page of a comparison: `compare.compare`, with each text's most telling passages."""
    body = [
        "<h1>Two models on the same text</h1>",
        f"<p>A is {escape(a.workdir)}, step {a.step:,}; B is {escape(b.workdir)}, step "
        f"{b.step:,}. A difference below 0 says that B is better.</p>",
        html(differences(record)),
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
                charts.documents(t["bits_per_byte_of_documents"], d["interval"], d["difference"])
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
    return document("Two models on the same text", body, SHADES)


def _surprise(scored: Scored, shown: int) -> Iterator[str]:
    """Spans of whole characters: tokens that share a character share a span."""
    ids, nats = scored.targets_I[:shown].tolist(), scored.nats_I[:shown].tolist()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, pending = "", []
    for i, (token, cost) in enumerate(zip(ids, nats, strict=True)):
        if token == scored.tokenizer.eot:
            yield f'<span class="end {_shade(cost)}" title="{cost:.2f} nats">end of text</span>\n'
            continue
        pending.append(cost)
        text += decoder.decode(scored.tokenizer.decode_bytes([token]), final=i == shown - 1)
        if decoder.getstate()[0]:
            continue  # within a character
        nats_text = " + ".join(f"{c:.2f}" for c in pending)
        yield _span(_shade(sum(pending)), f"{text!r}: {nats_text} nats", text)
        text, pending = "", []


def _passages(a: Scored, pieces: Pieces) -> Iterator[str]:
    largest = passages(pieces)
    total = sum(abs(p.nats) for p in largest) or 1.0
    for p in largest[:PASSAGES]:
        spans = []
        for i in range(p.start, p.stop):
            nats = float(pieces.difference[i])
            side, text = "ab"[nats < 0], text_of(a, pieces, i, i + 1)
            tooltip = f"A {pieces.nats_a[i]:.2f}, B {pieces.nats_b[i]:.2f} nats"
            spans.append(_span(f"{side}{_level(abs(nats) + 0.5)}", tooltip, text or "⏹"))
        better = "B" if p.nats < 0 else "A"
        yield (
            f"<article><p><b>{better} better by {abs(p.nats):.2f} nats</b> "
            f'<span class="soft">({abs(p.nats) / total:.1%}), document {pieces.document[p.start]}, '
            f"byte {pieces.offset[p.start]:,}</span></p>"
            f'<div class="text">{"".join(spans)}</div></article>'
        )


def _span(shade: str, title: str, text: str) -> str:
    return f'<span class="{shade}" title="{escape(title)}">{escape(text)}</span>'


def _shade(nats: float) -> str:
    return f"s{_level(nats)}"


def _level(nats: float) -> int:
    return int(nats) if nats < LEVELS - 1 else LEVELS - 1  # the last for NaN too


def _key(shades: list[tuple[str, str]], unit: str) -> str:
    spans = "".join(f'<span class="{name}">{label}</span>' for name, label in shades)
    return f'<p class="key">{spans} <span class="soft">{unit}</span></p>'


def _model(identity: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("model", f"{identity['workdir']}, step {identity['step']:,}"),
        *(
            (f"its {name}", f"sha256 {sha256}")
            for name, sha256 in identity.get("files", {}).items()
        ),
        ("parameters", f"{identity['parameters']:,}, sha256 {identity['model_sha256']}"),
        ("computed in", identity["numerics"]),
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
