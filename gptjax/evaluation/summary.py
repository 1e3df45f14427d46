"""An evaluation or a comparison as a person reads it in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gptjax.perplexity import Convention
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
    lines = []
    for name, score in record["scores"].items():
        lines.append((name, score))
        lines += [(f"  {domain}", s) for domain, s in score.get("by_domain", {}).items()]
    return lines


def notes(record: dict[str, Any]) -> list[str]:
    """How the intervals of each text were made, equal ways told once."""
    ways: dict[str, list[str]] = {}
    for name, score in record["scores"].items():
        ways.setdefault(score["interval_by"], []).append(name)
    return [f"{', '.join(names)}: interval {way}" for way, names in ways.items()]


def show(record: dict[str, Any]) -> None:
    """Prints what `run.record` returns."""
    table = Table()
    for heading in ("text", "tokens\ndocuments", "words\nbytes", *HEADINGS.values()):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name, s in rows(record):
        table.add_row(
            name,
            f"{s['tokens']:,}\n{s['documents']:,}",
            f"{s['words']:,}\n{s['bytes']:,}",
            *(
                Text.assemble(f"{number(s[f])}\n", (interval(s["interval"][f]), "dim"))
                for f in HEADINGS
            ),
        )
    positions = Table()
    texts = {name: s["by_position"] for name, s in record["scores"].items() if "by_position" in s}
    spans = {(p["from"], p["to"]): None for bins in texts.values() for p in bins}
    positions.add_column("tokens seen before", justify="right")
    for name in texts:
        positions.add_column(f"{name}\nnats/token", justify="right")
    for first, last in sorted(spans):
        cells = [next((p for p in t if p["from"] == first), None) for t in texts.values()]
        positions.add_row(
            f"{first}" if first == last else f"{first}–{last}",
            *(MISSING if p is None else number(p["loss"]) for p in cells),
        )
    console = new_console()
    console.print(_identified("model", record))
    console.print(f"convention: {convention(record)}")
    console.print(table)
    for note in notes(record):
        console.print(note)
    console.print(positions)
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
    table = Table()
    for heading in ("text", "figure", "A", "B", "B - A", "interval"):
        table.add_column(heading, justify="left" if heading in ("text", "figure") else "right")
    for name, t in record["texts"].items():
        for figure in ("bits_per_byte", "loss"):
            if figure in t:
                d = t[figure]
                ends = interval(d["interval"])
                table.add_row(
                    name,
                    HEADINGS[figure],
                    *map(number, (d["a"], d["b"], d["difference"])),
                    ends,
                )
        for domain, d in t["by_domain"].items():
            cells = number(d["difference"]), interval(d["interval"])
            table.add_row(f"  {domain}", "bits/byte", "", "", *cells)
    console.print(table)
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
        f"tokenizer {identity['tokenizer']}, sha256 {identity['tokenizer_sha256'][:16]}"
    )


def _around(text: str, peak: int) -> str:
    """The part of a passage round what differs most."""
    start = max(0, min(peak - 40, len(text) - 120))
    shown = " ".join(text[start : start + 120].split())
    return f"{'...' * (start > 0)}{shown}{'...' * (start + 120 < len(text))}"
