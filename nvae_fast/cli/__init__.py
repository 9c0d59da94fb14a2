"""The command line: `python -m nvae_fast COMMAND`, with a module for each command.

Exit codes: 0 done, 2 an error (one line on stderr; `--debug` shows where), 130 or 143 training was stopped by
SIGINT or SIGTERM after saving a checkpoint (`--resume` goes on from there).
"""

from nvae_fast.cli.parser import make_parser, parse
from nvae_fast.cli.program import main

__all__ = ["main", "make_parser", "parse"]
