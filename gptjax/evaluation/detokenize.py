"""De-tokenisers: what turns a corpus that was cut into tokens for an older model back into prose.

"the cat , which" has one more character than "the cat, which" and is far less likely to a model
of prose, so a perplexity on such a corpus says little without the name of its de-tokeniser.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# In this order, as lm-evaluation-harness has them (lm_eval/tasks/wikitext/preprocess_wikitext.py;
# Megatron-LM's wikitext_detokenizer is the same). Its rule for apostrophes before digits matches
# no prose at all (its pattern contains the slashes of another language), and is left out.
_WIKITEXT: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"s '", "s'"),
        *((rf" @{re.escape(mark)}@ ", mark) for mark in "-,."),
        *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        (r"= = = =", "===="),
        (r"= = =", "==="),
        (r"= =", "=="),
        (r" ° ", "°"),
        (r" \n", "\n"),
        (r"\n ", "\n"),
        (r" N ", " 1 "),
        (r" 's", "'s"),
    )
)


def wikitext(document: str) -> str:
    """WikiText-2 or -103 (Merity et al. 2016) as prose."""
    for pattern, replacement in _WIKITEXT:
        document = pattern.sub(replacement, document)
    return document


# Applied to a whole document at a time: quotation marks pair across lines.
DETOKENIZERS: dict[str, Callable[[str], str] | None] = {"none": None, "wikitext": wikitext}
