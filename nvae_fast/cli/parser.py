"""The parser of all commands and options."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from nvae_fast.cli import options

PROGRAM = "nvae_fast"
ERROR_CODE = 2

_FROM_PRESET = "; a preset may set another"


class _Parser(argparse.ArgumentParser):
    """One line of error instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
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
    """`--num_channels_enc=8` as `--num-channels-enc=8`: the well-known names have underscores."""
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _train_parser(_add(commands, "train", "train a model, or continue a run"))
    _evaluate_parser(_add(commands, "evaluate", "the likelihood of images under a model"))
    _sample_parser(_add(commands, "sample", "draw new images from a model"))
    _fid_parser(_add(commands, "fid", "Frechet inception distance between images of a model and a dataset"))
    _plot_parser(_add(commands, "plot", "the curves of one or several runs, as a picture"))
    _convert_parser(_add(commands, "convert", "official checkpoint to ours, or ours to official"))
    _prepare_parser(_add(commands, "prepare", "a data set as it is downloaded into LMDB databases"))
    _info_parser(_add(commands, "info", "versions, devices, and which backend runs what and why"))
    return parser


def _add(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error (default: no)")
    return parser


def _image_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--crop",
        type=options.whole_number,
        default=None,
        metavar="N",
        help="centre crop of the images of a folder or LMDB [pixels] (default: the short side; 148 for the aligned faces "
        "of celeba_64; a checkpoint's own)",
    )
    parser.add_argument(
        "--resample",
        choices=["bilinear", "lanczos"],
        default=None,
        help="filter that resizes the images of a folder or LMDB (default: lanczos; bilinear for celeba_64; a "
        "checkpoint's own)",
    )
    parser.add_argument(
        "--max-skipped-images",
        type=float,
        default=0.01,
        metavar="X",
        help="share of a folder's or LMDB's images that may be damaged and are skipped; more are an error, and so is a "
        "file that cannot be reached (default: 0.01; 0 skips none)",
    )


def _machine(parser: argparse.ArgumentParser, *, threads: bool = True) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:<index> (default: auto, which is a GPU when there is one)",
    )
    if threads:
        group.add_argument(
            "--threads",
            type=options.whole_number,
            default=None,
            metavar="N",
            help="CPU threads of PyTorch [threads] (default: none, which leaves PyTorch's choice)",
        )
    group.add_argument(
        "--progress",
        choices=["auto", "plain", "none"],
        default="auto",
        help="a bar on a terminal where tqdm is installed, and lines elsewhere; lines; or nothing (default: auto)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress and no notes (default: no)")


def _train_parser(parser: argparse.ArgumentParser) -> None:
    from nvae_fast.models.config import NVAEConfig
    from nvae_fast.training.config import TrainingConfig
    from nvae_fast.training.presets import PRESETS

    parser.epilog = (
        "Ctrl-C or SIGTERM finishes the current step, writes a checkpoint and exits with 130 or 143; a "
        "second Ctrl-C aborts at once. Presets: "
        + "; ".join(f"{entry.name}: {entry.summary}" for entry in PRESETS.values())
        + "."
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--preset",
        choices=list(PRESETS),
        default=None,
        help="model and training settings to start from, each of which an option given replaces (default: none, which is "
        "the default of every option)",
    )
    run.add_argument(
        "--data",
        default=None,
        metavar="NAME_OR_PATH",
        help="digits, photos, or a folder, array, IDX, CIFAR-10 or LMDB path (default: that of the preset "
        "digits_demo, or of the run to resume; else it must be given)",
    )
    run.add_argument(
        "--data-kind", default=None, metavar="KIND", help="format of --data (default: none, which guesses it)"
    )
    _image_options(run)
    run.add_argument(
        "--out",
        default=None,
        metavar="FOLDER",
        help="run folder to write (default: runs/<preset>, or runs/nvae)",
    )
    run.add_argument(
        "--resume", action="store_true", help="continue the run in --out bit for bit (default: no)"
    )
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="when --out holds a run, rename that folder and start anew (default: no)",
    )
    _machine(parser, threads=False)
    texts, units = options.training_texts()
    training = parser.add_argument_group("training")
    options.add_dataclass_options(training, TrainingConfig, texts, units=units, note=_FROM_PRESET)
    model = parser.add_argument_group("model")
    options.add_dataclass_options(model, NVAEConfig, options.MODEL_HELP, note=_FROM_PRESET)


def _evaluate_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="our checkpoint or run folder, or an official checkpoint")
    parser.add_argument(
        "--data",
        default=None,
        metavar="NAME_OR_PATH",
        help="images to evaluate on (default: the data the checkpoint was trained on)",
    )
    parser.add_argument(
        "--data-kind", default=None, metavar="KIND", help="format of --data (default: none, which guesses it)"
    )
    _image_options(parser)
    parser.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default=None,
        help="which part of the data (default: test, or the validation part where there is no test part; validation "
        "for celeba_64, as published)",
    )
    _number(parser, "--samples", 1, "K, draws of the importance-weighted bound, for every image", "draws")
    _number(parser, "--batch-size", 32, "images evaluated together", "images")
    _number(parser, "--max-images", None, "only the first so many images", "images")
    _number(parser, "--seed", 0, "seed of draws and binarisation", "")
    parser.add_argument(
        "--autocast", choices=["none", "bf16"], default="none", help="mixed precision (default: none)"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        default=None,
        metavar="FILE",
        help="write the result as JSON, to stdout without FILE (default: none, a table on stdout)",
    )
    _machine(parser)


def _sample_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="our checkpoint or run folder, or an official checkpoint")
    _number(parser, "--number", 64, "images to draw", "images", short="-n")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="factor on the sigma of every prior and on the pixel noise (default: 1)",
    )
    _number(parser, "--seed", 0, "seed: the same one gives the same images, on any number of processes", "")
    _number(parser, "--batch-size", 32, "images drawn together", "images")
    parser.add_argument(
        "--pixels",
        choices=["auto", "mean", "sample"],
        default="auto",
        help="the likelihood's mean or a draw from it (default: auto: mean for binary images, else a draw)",
    )
    parser.add_argument(
        "--readjust",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="re-estimate batch-norm statistics at this temperature first; the result is kept beside the "
        "checkpoint (default: no)",
    )
    _number(parser, "--readjust-passes", 500, "sampling passes of the re-estimation", "passes of 16 images")
    parser.add_argument(
        "--out", default="samples.png", metavar="FILE", help="PNG grid to write (default: samples.png)"
    )
    _number(parser, "--columns", None, "columns of the grid; none makes it square", "images")
    parser.add_argument(
        "--npy",
        default=None,
        metavar="FILE",
        help="also write the images as uint8 (N,H,W,C), which --data reads (default: none)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files (default: no)")
    _machine(parser)


def _convert_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint to read: official, or ours (file or run folder)")
    parser.add_argument("target", help="checkpoint to write, in the other format")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target (default: no)")


def _prepare_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=["celeba", "ffhq", "imagenet", "folder", "tfrecord"],
        help="celeba: img_align_celeba with list_eval_partition.txt, kept whole; ffhq, folder: image files; imagenet: "
        "folders train and val; tfrecord: raw images",
    )
    parser.add_argument("source", metavar="SRC", help="folder that holds the data set")
    parser.add_argument(
        "target", metavar="DST", help="folder to write; one that was stopped goes on where it was"
    )
    _number(parser, "--size", None, "side of the images; 256 for ffhq, 32 for imagenet", "pixels")
    _image_options(parser)
    parser.add_argument(
        "--validation",
        type=float,
        default=0.1,
        metavar="X",
        help="share of images, the last by name, of a folder without splits (default: 0.1)",
    )
    _number(parser, "--workers", 4, "threads that decode images", "threads")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes (default: no)")


def _info_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table (default: no)")


def _fid_parser(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Needs torch-fidelity (pip install torch-fidelity) and the weights of its InceptionV3 in a local file; "
        "nothing is downloaded. The usual FID takes 50000 samples and the images of the training split."
    )
    parser.add_argument("checkpoint", help="our checkpoint or run folder, or an official checkpoint")
    parser.add_argument(
        "--inception",
        required=True,
        metavar="FILE",
        help="weights of InceptionV3, such as torch-fidelity's weights-inception-2015-12-05-6726825d.pth "
        "(default: none, one is needed)",
    )
    parser.add_argument(
        "--data",
        default=None,
        metavar="NAME_OR_PATH",
        help="images to compare with (default: the data the checkpoint was trained on)",
    )
    parser.add_argument(
        "--data-kind", default=None, metavar="KIND", help="format of --data (default: none, which guesses it)"
    )
    parser.add_argument(
        "--split", choices=["train", "test"], default=None, help="which part of the data (default: train)"
    )
    _number(parser, "--max-images", None, "only the first so many images of the data", "images")
    parser.add_argument(
        "--stats",
        default=None,
        metavar="FILE",
        help=".npz file of mu and sigma: read in place of the data where it exists, written where it does not "
        "(default: none)",
    )
    parser.add_argument(
        "--layer",
        choices=["64", "192", "768", "2048"],
        default="2048",
        help="features to compare, by their number; fewer need fewer images (default: 2048, the published FID)",
    )
    parser.add_argument(
        "--kid",
        nargs="?",
        const=1000,
        type=options.whole_number,
        default=None,
        metavar="N",
        help="the kernel inception distance as well, from 100 random subsets of N images, 1000 without N [images] "
        "(default: none)",
    )
    _number(parser, "--number", 50_000, "images to draw", "images", short="-n")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="factor on the sigma of every prior, as sample has it (default: 1)",
    )
    _number(parser, "--seed", 0, "seed: the same one gives the same images, on any number of processes", "")
    _number(parser, "--batch-size", 32, "images drawn and compared together", "images")
    parser.add_argument(
        "--readjust",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="re-estimate batch-norm statistics at this temperature first, as sample does (default: no)",
    )
    _number(parser, "--readjust-passes", 500, "sampling passes of the re-estimation", "passes of 16 images")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        default=None,
        metavar="FILE",
        help="write the result as JSON, to stdout without FILE (default: none, a table on stdout)",
    )
    _machine(parser)


def _plot_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="run", help="run folder, or a metrics.jsonl")
    parser.add_argument(
        "--out",
        default=None,
        metavar="FILE",
        help="picture to write: .png, .pdf or .svg (default: curves.png in the run's folder, for one run)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file (default: no)")
    parser.add_argument("--quiet", action="store_true", help="no notes (default: no)")


def _number(
    parser: argparse.ArgumentParser, option: str, default: int | None, text: str, unit: str, short: str = ""
) -> None:
    shown = "none" if default is None else default
    parser.add_argument(
        *([short] if short else []),
        option,
        type=options.whole_number,
        default=default,
        metavar="N",
        help=f"{text}{f' [{unit}]' if unit else ''} (default: {shown})",
    )
