"""The commands, and the options of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nvae_fast.cli import options

_FROM_PRESET = "; a preset may set another"


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
    _progress(group)


def _progress(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--progress",
        choices=["auto", "plain", "none"],
        default="auto",
        help="a bar on a terminal where tqdm is installed, and lines elsewhere; lines; or nothing (default: auto)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes (default: no)")


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
        help="model and training settings to start from, each of which an option given replaces (default: none, which chooses "
        "a model by the images and the machine)",
    )
    run.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="options from a run's config.json, or TOML: each replaces that of --preset, and an option given replaces it "
        "(default: none)",
    )
    run.add_argument(
        "--init-from",
        default=None,
        metavar="CHECKPOINT",
        help="start from the weights of our checkpoint or run folder, or an official checkpoint, where name and shape fit; "
        "optimizer and step start anew (default: none, or that of --config)",
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
    options.add_image_options(run)
    options.add_cache_option(run)
    options.add_val_fraction(run)
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration, the number of parameters and the memory that is needed, and write nothing (default: no)",
    )
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


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="our checkpoint or run folder, or an official checkpoint")
    _weights(parser)


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=["model", "ema"],
        default=None,
        help="weights of the last step, or their averages of train --ema (default: ema where the checkpoint has them, else "
        "model)",
    )


def _images_of(
    parser: argparse.ArgumentParser,
    text: str,
    split: str = "test, or the validation part where there is no test part; validation for celeba_64, as published",
) -> None:
    """The checkpoint and the images of a command. text: what the images are for. split: the default part of them."""
    _checkpoint(parser)
    parser.add_argument(
        "--data",
        default=None,
        metavar="NAME_OR_PATH",
        help=f"{text} (default: the data the checkpoint was trained on)",
    )
    parser.add_argument(
        "--data-kind", default=None, metavar="KIND", help="format of --data (default: none, which guesses it)"
    )
    options.add_image_options(parser)
    parser.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default=None,
        help=f"which part of the data (default: {split})",
    )


def _evaluate_parser(parser: argparse.ArgumentParser) -> None:
    _images_of(parser, "images to evaluate on")
    _number(parser, "--samples", 1, "K, draws of the importance-weighted bound, for every image", "draws")
    _number(parser, "--batch-size", 32, "images evaluated together", "images")
    _number(parser, "--max-images", None, "only the first so many images", "images")
    _number(parser, "--seed", 0, "seed of draws and binarisation", "")
    parser.add_argument(
        "--autocast", choices=["none", "bf16", "fp16"], default="none", help="mixed precision (default: none)"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        default=None,
        metavar="FILE",
        help="also write the result as JSON; without FILE to stdout, and the table to stderr (default: none, the table alone)",
    )
    _machine(parser)


def _sample_parser(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    _number(parser, "--number", 64, "images to draw", "images", short="-n")
    _temperature(parser, "factor on the sigma of every prior")
    _pixel_temperature(parser)
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
        "--out",
        default=None,
        metavar="FILE_OR_FOLDER",
        help="FILE.png: a grid; any other name: a folder of images, resumed when it holds images of the same settings "
        "(default: samples.png, or the folder samples for more than 256 images)",
    )
    parser.add_argument(
        "--format",
        choices=["png", "npz"],
        default=None,
        help="files of the folder: a PNG for each image, or shards of up to 1000 images, array arr_0, uint8 (N,H,W,C) "
        "(default: png)",
    )
    parser.add_argument(
        "--grid",
        default=None,
        metavar="FILE",
        help="also write a PNG grid of the first 64 images of the folder (default: none)",
    )
    _number(parser, "--columns", None, "columns of the grid; none makes it square", "images")
    parser.add_argument(
        "--npy",
        default=None,
        metavar="FILE",
        help="with a grid: also write the images as uint8 (N,H,W,C), which --data reads (default: none)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace existing files, and rename an existing folder (default: no)",
    )
    _machine(parser)


def _interpolate_parser(parser: argparse.ArgumentParser) -> None:
    _images_of(parser, "images to go between")
    _number(parser, "--pairs", None, "pairs of images, a row each; 6 unless --images is given", "pairs")
    _number(parser, "--steps", 9, "pictures in a row, both ends included", "pictures")
    parser.add_argument(
        "--mode",
        choices=["spherical", "linear"],
        default="spherical",
        help="way between the latents of two images, in every group: an arc keeps their length, which a straight line "
        "shortens, as a lower temperature does (default: spherical)",
    )
    _latents_of(parser, "pairs of images by number, first and second of each pair in turn")
    _picture(parser, "interpolations.png")


def _reconstruct_parser(parser: argparse.ArgumentParser) -> None:
    _images_of(parser, "images to reconstruct")
    _number(
        parser, "--number", None, "images, a column each; 10 unless --images is given", "images", short="-n"
    )
    parser.add_argument(
        "--groups",
        type=options.whole_number,
        nargs="+",
        default=None,
        metavar="N",
        help="also a row for each N: the first N latent groups of the image, the others drawn from the prior "
        "(default: none)",
    )
    _temperature(parser, "factor on the sigma of the priors, with --groups", None)
    _latents_of(parser, "images by number")
    _picture(parser, "reconstructions.png")


def _latents_of(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--images",
        type=options.whole_number,
        nargs="+",
        default=None,
        metavar="N",
        help=f"{text} (default: none, chosen at random by --seed)",
    )
    parser.add_argument(
        "--posterior",
        choices=["sample", "mean"],
        default="sample",
        help="latents of an image: drawn from its posterior, or the mean (default: sample)",
    )
    _number(parser, "--seed", 0, "seed of the choice of images and of all draws", "")


def _picture(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", default=out, metavar="FILE", help=f"PNG to write (default: {out})")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file (default: no)")
    _machine(parser)


def _temperature(parser: argparse.ArgumentParser, text: str, default: float | None = 1.0) -> None:
    parser.add_argument(
        "--temperature",
        type=options.temperature,
        default=default,
        metavar="X",
        help=f"{text}; FIRST:LAST goes from the coarsest to the finest group in equal steps (default: 1)",
    )


def _pixel_temperature(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pixel-temperature",
        type=float,
        default=None,
        metavar="X",
        help="factor on the noise of the likelihood (default: 1, whatever --temperature is, as images of NVAE are "
        "published)",
    )


def _convert_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="checkpoint to read: official, ours (file or run folder), or .safetensors"
    )
    parser.add_argument(
        "target",
        help="file to write: safetensors where its name ends in .safetensors; else ours becomes official, anything else ours",
    )
    _weights(parser)
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
    options.add_image_options(parser)
    parser.add_argument(
        "--validation",
        type=float,
        default=0.1,
        metavar="X",
        help="share of images, the last by name, of a folder without splits (default: 0.1)",
    )
    _number(parser, "--workers", 4, "threads that decode images", "threads")
    _progress(parser)


def _info_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table (default: no)")
    parser.add_argument(
        "--data",
        default=None,
        metavar="NAME_OR_PATH",
        help="images to read for a few seconds, as training would, to show how many the loader reads in a second; no cache is "
        "used (default: none)",
    )
    parser.add_argument(
        "--data-kind", default=None, metavar="KIND", help="format of --data (default: none, which guesses it)"
    )
    options.add_image_options(parser)
    _number(parser, "--image-size", None, "side of the images; none takes the source's", "pixels")
    _number(parser, "--batch-size", 32, "images in a batch", "images")
    _number(parser, "--workers", None, "threads that read images; none takes those of training", "threads")
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="X", help="time to read for [seconds] (default: 3.0)"
    )


def _fid_parser(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Needs torch-fidelity (pip install torch-fidelity) and the weights of its InceptionV3 in a local file; "
        "nothing is downloaded. The usual FID takes 50000 samples and the images of the training split."
    )
    _images_of(parser, "images to compare with", "train")
    parser.add_argument(
        "--inception",
        required=True,
        metavar="FILE",
        help="weights of InceptionV3, such as torch-fidelity's weights-inception-2015-12-05-6726825d.pth "
        "(default: none, one is needed)",
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
    _temperature(parser, "factor on the sigma of every prior, as sample has it")
    _pixel_temperature(parser)
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


# {name: (what it does, what adds its options)}, in the order of the help text.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "train": ("train a model, or continue a run", _train_parser),
    "presets": ("what each preset sets", options.add_preset_name),
    "evaluate": ("the likelihood of images under a model", _evaluate_parser),
    "fid": ("Frechet inception distance between images of a model and a dataset", _fid_parser),
    "sample": ("draw new images from a model", _sample_parser),
    "interpolate": ("pictures between pairs of images", _interpolate_parser),
    "reconstruct": ("images beside their reconstructions", _reconstruct_parser),
    "plot": ("the curves of one or several runs, as a picture", _plot_parser),
    "convert": (
        "official checkpoint to ours, ours to official, or either to safetensors and back",
        _convert_parser,
    ),
    "prepare": ("a data set as it is downloaded into LMDB databases", _prepare_parser),
    "info": ("versions, devices, which backend runs what and why, and the speed of a loader", _info_parser),
}
