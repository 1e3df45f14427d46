"""Perplexity that can be audited: named texts, intervals, and what two models differ by."""
