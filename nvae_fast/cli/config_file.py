"""Options of `train` from a file: the config.json of a run, or TOML.

data = "photos"          # or a table [data] of source, kind, crop, resample and val_fraction
preset = "cifar10"       # also init_from

[model]                  # fields of NVAEConfig
num_channels_enc = 32

[training]               # fields of TrainingConfig
batch_size = 16
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nvae_fast.cli import options
from nvae_fast.models.config import NVAEConfig
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.presets import PRESETS

_TABLES = ("data", "model", "training")
_NAMES = ("preset", "data", "init_from")
_DATA = ("source", "kind", "crop", "resample", "val_fraction")
_KINDS: dict[str, tuple[type, ...]] = {"crop": (int,), "val_fraction": (int, float)}
# What config.json says besides, which is no option.
_FACTS = {"": ("versions",), "data": ("images",)}


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The options of a file. preset, init_from: None where it has none; data: some of `_DATA`; model, training:
    options by the names of the fields."""

    path: Path
    preset: str | None = None
    init_from: str | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fill_in(self, arguments: argparse.Namespace) -> None:
        """Set the arguments of `train` that are not given: preset and init_from; and how and from where images are read, where
        --data is not given."""
        for name in ("preset", "init_from"):
            if getattr(arguments, name) is None:
                setattr(arguments, name, getattr(self, name))
        if arguments.data is None:
            names = {"source": "data", "kind": "data_kind"} | {key: key for key in _DATA[2:]}
            for key, name in names.items():
                if getattr(arguments, name) is None:
                    setattr(arguments, name, self.data.get(key))


@contextlib.contextmanager
def errors_name_file(file: ConfigFile | None, given: Iterable[str]) -> Iterator[None]:
    """In errors that name options, say which of them come from the file, unless they are among those `given` besides."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if file is None:
            raise
        spelled = set(re.findall(r"--[a-z][a-z-]*", str(error)))
        named = [
            name
            for name in (*file.model, *file.training)
            if name not in given and options.spelled(name) in spelled
        ]
        raise type(error)(f"{error} ({', '.join(named)} in {file.path})" if named else str(error)) from error


def read(path: str) -> ConfigFile:
    """Read a file of options, or the config.json of a run folder. Raises ValueError that names the file and the key."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    document = _parse(file)
    _check_keys(file, "", document, (*_NAMES, *_TABLES))
    data = document.get("data") or {}
    data = {"source": data} if isinstance(data, str) else data
    tables = {"data": data, "model": document.get("model", {}), "training": document.get("training", {})}
    known = {
        "data": _DATA,
        "model": tuple(options.MODEL_HELP),
        "training": tuple(field.name for field in dataclasses.fields(TrainingConfig)),
    }
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"--config: {file}: {name} must be a table, got {type(table).__name__}")
        _check_keys(file, name, table, known[name], known)
    for name in ("preset", "init_from"):
        value = document.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"--config: {file}: {name} must be a string, got {type(value).__name__}")
    preset = document.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--config: {file}: unknown preset {preset!r}{_hint(preset, PRESETS)}")
    _check_data(file, data)
    return ConfigFile(
        file,
        document.get("preset"),
        document.get("init_from"),
        {key: value for key, value in data.items() if key in _DATA},
        _without_none(NVAEConfig, tables["model"]),
        _without_none(TrainingConfig, tables["training"]),
    )


def _parse(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ValueError(f"--config: cannot read {file}: {reason}") from error
    if file.suffix == ".json":
        loads = json.loads
    elif file.suffix == ".toml":
        loads = _toml(file).loads
    else:
        raise ValueError(f"--config: {file}: expected a file that ends in .json or .toml, or a run folder")
    try:
        document = loads(text)
    except ValueError as error:  # both parsers' errors are
        raise ValueError(f"--config: {file}: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"--config: {file}: expected a table of options, got {type(document).__name__}")
    return document


def _toml(file: Path) -> Any:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--config: {file}: Python before 3.11 reads TOML with the package tomli: pip install tomli, or write the file "
            "as JSON"
        ) from error


def _check_keys(
    file: Path, table: str, found: dict[str, Any], known: Iterable[str], others: dict[str, Any] | None = None
) -> None:
    for key in found:
        if key in known or key in _FACTS.get(table, ()):
            continue
        place = [name for name, names in (others or _fields()).items() if key in names and name != table]
        hint = f"; it belongs in [{place[0]}]" if place else _hint(key, known)
        where = f" in [{table}]" if table else ""
        raise ValueError(f"--config: {file}: unknown key {key!r}{where}{hint}")


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"


def _fields() -> dict[str, Any]:
    training = [field.name for field in dataclasses.fields(TrainingConfig)]
    return {"model": list(options.MODEL_HELP), "training": training}


def _check_data(file: Path, data: dict[str, Any]) -> None:
    for key in _DATA:
        value, kind = data.get(key), _KINDS.get(key, (str,))
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(
                f"--config: {file}: {key} in [data] must be {kind[-1].__name__}, got {type(value).__name__}"
            )


def _without_none(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with "none", as the command line spells it, as None where the field may be None: TOML has no null."""
    optional = {field.name for field in dataclasses.fields(cls) if "None" in str(field.type)}
    return {
        name: None if name in optional and isinstance(value, str) and value.lower() == "none" else value
        for name, value in values.items()
    }
