"""Pages of an evaluation and a comparison: well-formed, complete, and asking for nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.evaluation import pages
from gptjax.evaluation.audit import Audit, record
from gptjax.evaluation.compare import compare
from gptjax.report.page import write
from tests.test_evaluation import BYTES, GPT2, make_text, told

VOID = {"meta", "br", "hr", "img", "link", "input"}
# What a careless page would run, load or break on.
NASTY = '<script src="http://x.y/z.js">alert("&")</script>\n<img src=x> 七嘴八舌 🙂 &amp; end'
HTML_NAME = "<b>set</b>"


class Page(HTMLParser):
    """Checks that tags nest and keeps what a reader sees and what a browser would load."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.tags: set[str] = set()
        self.loaded: list[str] = []
        self.spans: list[tuple[str, str, str]] = []  # class, title and text in .text
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.tags.add(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href", "data", "srcset") and v]
        self.loaded += re.findall(r"url\(([^)]*)\)|@import", " ".join(v or "" for _, v in attrs))
        if tag in VOID:
            return
        self.open.append((tag, found))
        if tag == "span" and any(a.get("class") == "text" for _, a in self.open):
            self.spans.append((found["class"], found["title"], ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            assert "url(" not in data and "@import" not in data
        if self.open and self.open[-1][0] == "span" and self.spans:
            kind, title, text = self.spans[-1]
            self.spans[-1] = (kind, title, text + data)


def audit(folder: Path, *documents: str, tokens=GPT2, seed: int = 0, **options) -> Audit:
    text = make_text(folder, *documents, tokens=tokens, **options)
    nats = np.random.default_rng(seed).gamma(1, 3, text.store.num_tokens)
    scored = told(text, nats, tokens)
    return Audit("runs/<x>", 7, 10, "0" * 64, "float32", tokens, {HTML_NAME: scored})


def test_a_page_is_well_formed_and_loads_nothing(tmp_path):
    domains = ["<i>a</i>", "b"] * 6
    found = audit(tmp_path / "s", *[NASTY, "plain text\n"] * 6, domains=domains)
    html = pages.page(record(found), found)
    page = Page(html)
    assert all(address.startswith("#") for address in page.loaded), page.loaded
    assert not page.tags & {"script", "link", "img", "iframe", "i", "object"}
    assert "svg" in page.tags and html.count("<svg") == 2
    assert not re.search("https?:", html)  # the text's own address is cut by its tokens' spans
    # Every token's text is there once, in order, characters whole.
    shown = "".join(text for kind, _, text in page.spans if "end" not in kind)
    assert shown == (NASTY + "plain text\n") * 6
    assert "�" not in html


def test_a_shade_is_a_nat_and_the_pointer_shows_the_token(tmp_path):
    text = make_text(tmp_path / "s", "é!", tokens=BYTES)
    scored = told(text, [1.25, 2.5, 40, 0.1])
    found = Audit("runs/x", 7, 10, "0" * 64, "float32", BYTES, {"t": scored})
    spans = Page(pages.page(record(found), found)).spans
    assert spans == [
        ("s3", "'é': 1.25 + 2.50 nats", "é"),  # two tokens, one character
        ("s9", "'!': 40.00 nats", "!"),
        ("end s0", "0.10 nats", "end of text"),
    ]


def test_long_texts_are_capped_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "SHOWN_TOKENS", 5)
    found = audit(tmp_path / "s", "a long text of bytes, 七", tokens=BYTES)
    html = pages.page(record(found), found)
    assert "The first 5 of 26 tokens" in html
    assert len(Page(html).spans) == 5
    # A cut within a character shows what there is of it.
    monkeypatch.setattr(pages, "SHOWN_TOKENS", 23)
    assert Page(pages.page(record(found), found)).spans[-1][2] == "�"


def test_a_comparison_shows_where_it_differs(tmp_path):
    documents = [NASTY, "plain text\n"] * 6
    a = audit(tmp_path / "a", *documents)
    b = audit(tmp_path / "b", *documents, tokens=BYTES, seed=1)
    told_both = compare(a, b)
    html = pages.comparison_page(told_both, a, b)
    page = Page(html)
    assert all(address.startswith("#") for address in page.loaded), page.loaded
    assert not re.search("https?:", html)
    assert html.count("<article>") == 12 and html.count("<svg") == 1
    shown = "".join(text for _, _, text in page.spans)
    assert "七嘴八舌 🙂" in shown and NASTY in shown.replace("⏹", "")
    first = told_both["texts"][HTML_NAME]["passages"][0]
    better = "B" if first["nats"] < 0 else "A"
    assert f"{better} better by {abs(first['nats']):.2f} nats" in html
    # Colour says who is better, by how much.
    for kind, title, _ in page.spans:
        costs = re.fullmatch(r"A ([\d.]+), B ([\d.]+) nats", title)
        difference = float(costs[2]) - float(costs[1])
        # The title is rounded to 0.01, so one near a half may be of either shade.
        shades = {min(round(abs(difference) + e), 9) for e in (-0.01, 0, 0.01)}
        assert kind[0] == ("b" if difference < 0 else "a") and int(kind[1:]) in shades


def test_the_same_record_makes_the_same_page(tmp_path):
    found = audit(tmp_path / "s", *["a b"] * 12)
    assert pages.page(record(found), found) == pages.page(record(found), found)


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot write --html=.*none/page.html: No such file"):
        write(tmp_path / "none" / "page.html", "")
