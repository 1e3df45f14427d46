"""Ablations: what is asked, what is run, and what may be concluded."""
