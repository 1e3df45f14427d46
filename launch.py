"""The one entry: `python launch.py COMMAND --config=FILE ...`; `--help` tells the rest."""

import sys

from gptjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
