"""The parser of the command line, with its errors and hints."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from nvae_fast.cli.commands import COMMANDS
from nvae_fast.version import __version__

PROGRAM = "nvae_fast"
ERROR_CODE = 2


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '([^']*)' \((?:choose from )?(.*)\)", message):
            known = [name.strip(" '") for name in found[2].split(",")]
            close = difflib.get_close_matches(found[1], known, n=1, cutoff=0.6)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(ERROR_CODE, f"{PROGRAM}: error: {message} (see python -m {self.prog} --help)\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line. Raises SystemExit where argparse would."""
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(_with_dashes(words))
    if unknown:
        command = _commands(parser)[arguments.command]
        hints = [hint for word in unknown if (hint := _hint(word, command)) is not None]
        command.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(f'; {h}' for h in hints)}")
    return arguments


def options_of(command: str) -> list[str]:
    """Names of the arguments of a command, sorted."""
    actions = _commands(make_parser())[command]._actions
    return sorted(action.dest for action in actions if action.dest != "help")


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


# Options of the official program: the option of ours that does the same, if any, and what to say of it.
_OFFICIAL = {
    "--cont-training": ("--resume", "which continues the run in --out"),
    "--root": ("--out", "which names the run folder"),
    "--save": ("--out", "which names the run folder"),
    "--checkpoint": ("", "the checkpoint is given without an option"),
    "--eval-mode": ("", "the commands are evaluate and sample"),
    "--eval-on-train": ("--split", "as in --split train"),
    "--num-iw-samples": ("--samples", "the draws of the importance-weighted bound"),
    "--temp": ("--temperature", ""),
    "--readjust-bn": ("--readjust", "which re-estimates the batch-norm statistics"),
    "--fast-adamax": ("", "Adamax is always the fused one"),
    "--num-process-per-node": ("", "processes are started by torchrun --nproc-per-node N"),
    "--num-proc-node": ("", "processes are started by torchrun --nnodes N"),
    "--node-rank": ("", "processes are started by torchrun --node-rank N"),
    "--master-address": ("", "processes are started by torchrun --master-addr ADDRESS"),
}


def _hint(word: str, command: argparse.ArgumentParser) -> str | None:
    """What was probably meant by an option that a command does not have."""
    name = word.partition("=")[0]
    known = [option for action in command._actions for option in action.option_strings]
    ours, text = _OFFICIAL.get(name, ("", ""))
    if ours in known:
        return f"did you mean {ours}{text and f', {text}'}?"
    if text and not ours:
        return f"{name} is not needed: {text}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7) if name.startswith("--") else []
    return f"did you mean {close[0]}?" if close else None


def _with_dashes(words: Sequence[str]) -> list[str]:
    """Replace underscores in option names: `--num_channels_enc=8` is `--num-channels-enc=8`."""
    result = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        result.append(word)
    return result


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands and options."""
    parser = _Parser(
        prog=PROGRAM,
        description="Train, evaluate and sample NVAE models.",
        epilog="Options may be spelt with underscores (--num_channels_enc). Exit codes: 0 done, 2 error, "
        "130 or 143 training stopped by SIGINT or SIGTERM after saving.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (text, add_options) in COMMANDS.items():
        add_options(_add(commands, name, text))
    return parser


def _add(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error (default: no)")
    return parser
