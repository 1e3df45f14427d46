"""A plan as a person reads it: in the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gptjax.plan.estimate import LARGE
from gptjax.plan.hardware import Hardware
from gptjax.plan.search import Found
from gptjax.report.formats import Table, html, terminal
from gptjax.report.page import definitions, document
from gptjax.report.terminal import MISSING, new_console
from gptjax.sharding import in_words

GIB = 2**30
SHOWN = 12  # arrays in the terminal; the page and --json have all
PURPOSES = {
    "parameters": "parameters",
    "optimizer": "optimiser",
    "ema": "weight average",
    "gradients": "gradients",
    "activations": "activations, logits",
    "temporaries": "temporaries",
    "total": "total",
}


def size(number: float) -> str:
    """Bytes for a person."""
    if abs(number) >= 2**40:
        return f"{number / 2**40:,.2f} TiB"
    return f"{number / GIB:,.2f} GiB" if abs(number) >= GIB / 2 else f"{number / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.2f} ms"


def verdict(record: Mapping[str, Any]) -> str:
    """Whether it fits, in a line."""
    fits, usable = record["fits"], size(record["chip"]["usable"])
    if fits["words"] is not None:
        return f"does not fit on {record['on']} ({fits['by']}): {fits['words']}"
    left = size(abs(fits["left"]))
    total = size(record["memory"]["total"][0])
    if fits["fits"]:
        return (
            f"fits on {record['on']} ({fits['by']}): {total} of {usable} a device, {left} are left"
        )
    return f"does not fit on {record['on']} ({fits['by']}): {total} of {usable} a device, {left} too much"


def facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What stands above the tables."""
    yield "verdict", verdict(record)
    mesh = in_words(record["mesh"])
    yield "mesh", f"{record['devices']} devices, {mesh}; attention: {record['attention']}"
    yield "how", record["how"]
    if record["compile"] is not None:
        c = record["compile"]
        yield "compile", f"{c['seconds']:,.0f} s, {size(c['host_bytes'])} of this host ({c['by']})"
    flops = record["flops"]
    yield (
        "FLOPs",
        f"{flops['token'][0]:.4g} a token, {flops['step'][0]:.4g} a step, {flops['run'][0]:.4g} in "
        f"all, {record['parameters'] / 1e6:,.1f}M parameters ({flops['token'][1]})",
    )
    if record["unread"]:
        yield "collectives", f"not counted: {record['unread']}"


def memory(record: Mapping[str, Any]) -> Table:
    rows = [
        [PURPOSES.get(name, name), size(value), f"{value / record['chip']['usable']:.1%}", by]
        for name, (value, by) in record["memory"].items()
        if value or name == "total"
    ]
    return Table(["memory of a device", "size", "of what is usable", "by"], rows, ["by"])


def traffic(record: Mapping[str, Any]) -> Table:
    rows = [
        [
            row["kind"],
            row["across"],
            f"{row['times']:,}",
            size(row["sent"]),
            MISSING if row["seconds"] is None else duration(row["seconds"]),
            f"{row['by']}\ntime: estimate",
        ]
        for row in record["collectives"]
    ]
    headings = ["collective", "across", "a step", "a device sends", "at the published rate", "by"]
    return Table(headings, rows, ["collective", "across", "by"])


def time(record: Mapping[str, Any]) -> Table:
    """The range, and what finished runs make of it."""
    columns = {"low end": record["range"]["low"], "high end": record["range"]["high"]}
    if (forecast := record["forecast"]) is not None:
        runs = f"{forecast['runs']} run{'s' * (forecast['runs'] > 1)}"
        names = {"middle": f"forecast\n{runs}", "low": "from", "high": "to"}
        columns |= {names[name]: forecast[name] for name in names if name in forecast}
    shown = {
        "a step": lambda c: duration(c["step"]),
        "MFU": lambda c: f"{c['mfu']:.1%}",
        "days": lambda c: f"{c['days']:,.2f}",
        "dollars": lambda c: MISSING if c["dollars"] is None else f"{c['dollars']:,.0f}",
    }
    rows = [
        [name, *(show(c) for c in columns.values()), "estimate"] for name, show in shown.items()
    ]
    return Table(["time and cost", *columns, "by"], rows, ["by"])


def parts_of_time(record: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {duration(value)}" for name, (value, _) in record["seconds"].items())
    price = record["dollars_an_hour"]
    cost = (
        "no price on file: give --dollars"
        if price is None
        else f"{price:,.2f} dollars an hour for all"
    )
    return (
        f"at the peak of each: {parts} (estimate); {cost}, figures of {record['chip']['date']}. "
        "The low end has them at once, the high end one after another; neither is a forecast"
    )


def arrays(record: Mapping[str, Any], most: int | None = None) -> Table:
    """The largest first, with a mark on large ones that every device has whole."""
    ordered = sorted(record["arrays"], key=lambda a: -a["bytes"])
    rows = [
        [
            a["path"],
            " x ".join(map(str, a["shape"])) or "scalar",
            a["letters"] or MISSING,
            a["spec"] or MISSING,
            size(a["bytes"]),
            "whole on every device" if a["flagged"] else "",
        ]
        for a in ordered[:most]
    ]
    headings = ["array", "shape", "letters", "split over", "a device", "flag"]
    return Table(headings, rows, ["array", "letters", "split over", "flag"])


def flags(record: Mapping[str, Any]) -> str:
    flagged = [a for a in record["arrays"] if a["flagged"]]
    if not flagged:
        return f"no array above {size(LARGE)} lies whole on every device"
    held = sum(a["bytes"] for a in flagged)
    return (
        f"{len(flagged)} arrays above {size(LARGE)} lie whole on every device, {size(held)} "
        "together: the knobs of the section mesh split them"
    )


def show(record: Mapping[str, Any]) -> None:
    """Prints a plan."""
    console = new_console()
    for name, text in facts(record):
        console.print(text if name == "verdict" else f"{name}: {text}")
    console.print(terminal(memory(record)))
    if record["collectives"]:
        console.print(terminal(traffic(record)))
    console.print(terminal(time(record)))
    console.print(parts_of_time(record))
    console.print(terminal(arrays(record, SHOWN)))
    if (more := len(record["arrays"]) - SHOWN) > 0:
        console.print(f"and {more} smaller ones: --html or --json has them")
    console.print(flags(record))


def show_search(found: Sequence[Found], hardware: Hardware) -> None:
    """Prints what fits, the fastest first, and what does not."""
    rows = []
    for one in found:
        if one.plan is None:
            rows.append([one.name, f"cannot run\n{one.refused}", *[MISSING] * 5])
            continue
        plan, low, high = one.plan, one.plan["range"]["low"], one.plan["range"]["high"]
        fits = "fits" if plan["fits"]["fits"] else "does not fit"
        why = plan["fits"]["words"] or plan["fits"]["by"]
        dollars = [
            MISSING if end["dollars"] is None else f"{end['dollars']:,.0f}" for end in (low, high)
        ]
        rows.append(
            [
                one.name,
                f"{fits}\n{why}",
                MISSING if plan["fits"]["left"] is None else size(plan["memory"]["total"][0]),
                f"{duration(low['step'])} – {duration(high['step'])}",
                f"{high['mfu']:.0%} – {low['mfu']:.0%}",
                f"{low['days']:,.2f} – {high['days']:,.2f}",
                " – ".join(dollars),
            ]
        )
    headings = ["candidate", hardware.name, "a device", "a step", "MFU", "days", "dollars"]
    console = new_console()
    console.print(terminal(Table(headings, rows, ["candidate", hardware.name])))
    console.print("times are ranges of estimates, in order of their high ends for a token")


def show_budget(rows: Sequence[Mapping[str, Any]], dollars: float) -> None:
    """Prints what the money buys, the least loss first."""
    table = Table(
        ["candidate", "parameters", "tokens", "loss", "beyond the ladder"],
        [
            [
                row["name"],
                f"{row['parameters']:.4g}",
                f"{row['tokens'][1]:.4g}\n{row['tokens'][0]:.3g} – {row['tokens'][2]:.3g}",
                f"{row['loss']:.4f}\n{row['interval'][0]:.4f} – {row['interval'][1]:.4f}",
                f"{row['beyond']:.3g} times" if row["beyond"] > 1 else "no",
            ]
            for row in rows
        ],
        ["candidate"],
    )
    console = new_console()
    console.print(f"what {dollars:,.2f} dollars buy, by the law of scale (estimate):")
    console.print(terminal(table))
    console.print("the interval spans the range of the time and the law's 95% bootstrap")


def page(record: Mapping[str, Any]) -> str:
    """The plan as a page that needs nothing but itself."""
    title = f"{record['parameters'] / 1e6:,.0f}M parameters on {record['on']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(verdict(record))}</p>",
        definitions([fact for fact in facts(record) if fact[0] != "verdict"]),
        "<h2>Memory</h2>",
        html(memory(record)),
        "<h2>Time and cost</h2>",
        html(time(record)),
        f'<p class="soft">{escape(parts_of_time(record))}</p>',
    ]
    if record["collectives"]:
        body += ["<h2>Collectives of a step</h2>", html(traffic(record))]
    body += ["<h2>Arrays</h2>", f"<p>{escape(flags(record))}</p>", html(arrays(record))]
    knobs = [
        (f"{section}.{knob}", repr(value))
        for section, knobs in record["config"].items()
        if isinstance(knobs, dict)
        for knob, value in knobs.items()
    ]
    body += ["<h2>Config</h2>", definitions(knobs)]
    return document(title, body)
