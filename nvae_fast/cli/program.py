"""The program `python -m nvae_fast`: parses the command line, runs the command, prints errors as one line."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Sequence

from nvae_fast.cli.parser import ERROR_CODE, PROGRAM, parse
from nvae_fast.training.launch import find_launch

INTERRUPT_CODE = 130
# "batch_size (--batch-size)", "crop, resample (--crop, --resample)", "val_fraction=0.1 (--val-fraction 0.1)"
_DOUBLE = re.compile(
    r"(?<!\S)[a-z_]+(?:(?:, | and )[a-z_]+)* \((--[a-z][a-z-]*(?:(?:, | and )--[a-z][a-z-]*)*)\)"
    r"|(?<!\S)[a-z_]+=[\w.]+ \((--[a-z][a-z-]* [\w.]+)\)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else ERROR_CODE
    try:
        command = importlib.import_module(f"nvae_fast.cli.{arguments.command}")
        return command.run(arguments)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: aborted; checkpoints written before are intact", file=sys.stderr)
        return INTERRUPT_CODE
    except BrokenPipeError:
        # The reader of the output has closed it (`| head`), which is no error.
        sys.stderr.close()
        return 0
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"{PROGRAM}:{_process()} error: {one_line(error)}", file=sys.stderr)
        return ERROR_CODE


def _process() -> str:
    """Which of several processes reports the error; empty for a process of its own."""
    try:
        launch = find_launch()
    except ValueError:  # which is the error to report
        return ""
    return "" if launch.size == 1 else f" process {launch.rank} of {launch.size}:"


def one_line(error: BaseException) -> str:
    """The message of an error as the command line shows it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    known = (ValueError, TypeError, OSError, RuntimeError, ImportError)
    # Where the library names an argument and its option, the user of the command line knows the option.
    lines = [_DOUBLE.sub(lambda found: found[1] or found[2], line) for line in lines]
    prefix = "" if isinstance(error, known) and lines else f"{type(error).__name__}: "
    return prefix + "; ".join(lines) if lines else type(error).__name__
