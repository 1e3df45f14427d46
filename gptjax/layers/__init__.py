"""The parts of a block, each a literal table of variants."""
