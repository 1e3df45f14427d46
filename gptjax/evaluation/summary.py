"""An evaluation or a comparison as a person reads it in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptjax.perplexity import Convention
from gptjax.report.formats import Table, terminal
from gptjax.report.terminal import MISSING, new_console, number

# Figure -> its heading.
HEADINGS = {
    "loss": "nats/token",
    "perplexity": "token perplexity",
    "word_perplexity": "word perplexity",
    "bits_per_byte": "bits/byte",
}


def interval(ends: Sequence[float | None]) -> str:
    return MISSING if None in ends else f"{number(ends[0])} – {number(ends[1])}"


def convention(identity: dict[str, Any]) -> str:
    """The rules of a score in a line."""
    return str(Convention(**identity["convention"]))


def rows(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The texts, each followed by its domains."""
    labelled_scores = []
    for name, score in record["scores"].items():
        labelled_scores.append((name, score))
        labelled_scores += [(f"  {domain}", s) for domain, s in score.get("by_domain", {}).items()]
    return labelled_scores


def notes(record: dict[str, Any]) -> list[str]:
    """How the intervals of each text were made, equal ways told once."""
    ways: dict[str, list[str]] = {}
    for name, score in record["scores"].items():
        ways.setdefault(score["interval_by"], []).append(name)
    return [f"{', '.join(names)}: interval {way}" for way, names in ways.items()]


def scores(record: dict[str, Any]) -> Table:
    """Counts and figures of the texts and their domains, of what `audit.record` returns."""
    headings = ("text", "tokens\ndocuments", "words\nbytes", *HEADINGS.values())
    lines = [
        (
            name,
            f"{s['tokens']:,}\n{s['documents']:,}",
            f"{s['words']:,}\n{s['bytes']:,}",
            *(f"{number(s[f])}\n{interval(s['interval'][f])}" for f in HEADINGS),
        )
        for name, s in rows(record)
    ]
    return Table(headings, lines, {"text"})


def positions(record: dict[str, Any]) -> Table:
    """Each text's loss by the tokens that a prediction could see."""
    texts = {name: s["by_position"] for name, s in record["scores"].items() if "by_position" in s}
    spans = sorted({(p["from"], p["to"]) for by_position in texts.values() for p in by_position})
    lines = []
    for first, last in spans:
        at_this_span = [next((p for p in t if p["from"] == first), None) for t in texts.values()]
        losses = [MISSING if p is None else number(p["loss"]) for p in at_this_span]
        lines.append((f"{first}" if first == last else f"{first}–{last}", *losses))
    headings = ("tokens seen before", *(f"{name}\nnats/token" for name in texts))
    return Table(headings, lines, ())


def differences(record: dict[str, Any]) -> Table:
    """What two models differ by on the texts and their domains, of what `compare` returns."""
    lines = []
    for name, t in record["texts"].items():
        compared = [(name, f, t[f]) for f in ("bits_per_byte", "loss") if f in t]
        compared += [(f"  {domain}", "bits_per_byte", d) for domain, d in t["by_domain"].items()]
        for label, figure, d in compared:
            values = [number(d[k]) if k in d else "" for k in ("a", "b", "difference")]
            lines.append((label, HEADINGS[figure], *values, interval(d["interval"])))
    headings = ("text", "figure", "A", "B", "B − A", "95% interval")
    return Table(headings, lines, {"text", "figure"})


def show(record: dict[str, Any]) -> None:
    """Prints what `audit.record` returns."""
    console = new_console()
    console.print(_identified("model", record))
    console.print(f"convention: {convention(record)}")
    console.print(terminal(scores(record)))
    for note in notes(record):
        console.print(note)
    console.print(terminal(positions(record)))
    for name, s in record["scores"].items():
        if "text_sha256" in s:
            sentence = f"{name}: {s['source']}, sha256 {s['text_sha256'][:16]}"
            if s["detokenizer"] != "none":
                sentence += f" after de-tokeniser {s['detokenizer']}; words and bytes before it"
            console.print(sentence)


def show_comparison(record: dict[str, Any]) -> None:
    """Prints what `compare.compare` returns."""
    console = new_console()
    for side in ("a", "b"):
        console.print(_identified(side.upper(), record[side]))
        console.print(f"   convention: {convention(record[side])}")
    console.print(terminal(differences(record)))
    for name, t in record["texts"].items():
        better = t["documents_better"]
        console.print(
            f"{name}: interval {t['interval_by']}; A is better on {better['a']:,}, B on "
            f"{better['b']:,} of {t['documents']:,} documents. Where they differ most, in nats:",
        )
        for p in t["passages"][:5]:
            place = f"document {p['document']}, byte {p['byte']:,}"
            console.print(f"{p['nats']:+9.2f}  {place}: {_around(p['text'], p['peak'])}")


def _identified(label: str, identity: dict[str, Any]) -> str:
    return (
        f"{label}: {identity['workdir']}, step {identity['step']:,}, "
        f"{identity['parameters']:,} parameters, sha256 {identity['model_sha256'][:16]}; "
        f"{identity['numerics']}; "
        f"tokenizer {identity['tokenizer']}, sha256 {identity['tokenizer_sha256'][:16]}"
    )


def _around(text: str, peak: int) -> str:
    """The part of a passage round what differs most."""
    start = max(0, min(peak - 40, len(text) - 120))
    shown = " ".join(text[start : start + 120].split())
    return f"{'...' * (start > 0)}{shown}{'...' * (start + 120 < len(text))}"
