"""An HTML page that needs nothing but itself."""

from __future__ import annotations

from html import escape
from pathlib import Path

from gptjax.config import UserError

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
td.text { white-space: normal; } td.text, th.text { text-align: left; }
.dense th, .dense td { padding: .35rem .45rem; font-size: .88rem; } .dense small { font-size: .9em; }
td.in, .dense td.in { padding-left: 1.2rem; color: var(--soft); }
svg { max-width: 100%; height: auto; font-family: system-ui, sans-serif; }
div.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #fff; padding: 1rem 1.2rem;
  border: 1px solid var(--line); border-radius: 6px; line-height: 1.8; }
div.text span { border-radius: 2px; } div.text span:hover { outline: 1px solid var(--ink); }
.end { color: var(--soft); font-size: .75rem; }
.key span { display: inline-block; padding: 0 .55rem; font-size: .82rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; }
article { margin: 0 0 1.1rem; } article p { margin: 0 0 .25rem; }
"""


def write(path: Path, page: str) -> None:
    """Writes a page; its folder must exist."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --html={path}: {error.strerror or error}") from error


def definitions(facts: list[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd><code>{escape(v)}</code></dd>" for k, v in facts)
    return f"<dl>{items}</dl>"


def document(title: str, body: list[str], style: str = "") -> str:
    """The whole page; `style` is CSS beside that of all pages."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{chr(10).join(body)}</main></body></html>\n"
    )
