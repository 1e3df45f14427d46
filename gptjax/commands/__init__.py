"""The commands by theme, each file with its rows of the table that `cli` merges."""
