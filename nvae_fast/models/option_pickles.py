"""Paths, namespaces and configuration objects in the pickled options of a file, read as plain data.

Each class takes the place of one whose own constructor would run, or which is not installed: paths become ``pathlib``'s pure
paths, a SimpleNamespace becomes an argparse.Namespace, configurations become dicts and lists.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from nvae_fast.models.numpy_pickles import StandIn


class Config(StandIn):
    """Takes the place of the containers and nodes of OmegaConf and of ml_collections.ConfigDict; ``value`` is what it holds."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("a configuration object has an unknown state")
        self.value = next((state[key] for key in ("_content", "_val", "_fields") if key in state), None)


class Kind(StandIn):
    """Takes the place of a type that a configuration names, such as int or typing.Any; ``value`` is None."""

    def __setstate__(self, state: Any) -> None:
        """Ignore it."""


def posix_path(*parts: str) -> PurePosixPath:
    return PurePosixPath(*_strings(parts))


def windows_path(*parts: str) -> PureWindowsPath:
    return PureWindowsPath(*_strings(parts))


def _strings(parts: tuple[Any, ...]) -> tuple[str, ...]:
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a path does not consist of strings")
    return parts


def items(values: Any) -> list[Any]:
    """Take the place of frozenset, without computing hashes. PyTorch itself reads a set."""
    if not isinstance(values, list):
        raise ValueError("a set does not hold a list of values")
    return values


def mapping(*kinds: Any) -> OrderedDict[Any, Any]:
    """Take the place of collections.defaultdict."""
    return OrderedDict()


_NODES = ("AnyNode", "IntegerNode", "FloatNode", "BooleanNode", "StringNode", "BytesNode", "PathNode")
_DICTS = ("munch.Munch", "easydict.EasyDict", "addict.addict.Dict", "yacs.config.CfgNode")

GLOBALS: dict[str, Any] = {
    "types.SimpleNamespace": argparse.Namespace,
    **{f"pathlib{local}.{kind}PosixPath": posix_path for local in ("", "._local") for kind in ("", "Pure")},
    **{
        f"pathlib{local}.{kind}WindowsPath": windows_path
        for local in ("", "._local")
        for kind in ("", "Pure")
    },
    "omegaconf.dictconfig.DictConfig": Config,
    "omegaconf.listconfig.ListConfig": Config,
    **{f"omegaconf.nodes.{node}": Config for node in _NODES},
    "ml_collections.config_dict.config_dict.ConfigDict": Config,
    "omegaconf.base.Metadata": Kind,
    "omegaconf.base.ContainerMetadata": Kind,
    "typing.Any": Kind,
    **{f"builtins.{kind}": Kind for kind in ("dict", "list", "int", "float", "str", "bool", "bytes")},
    "builtins.frozenset": items,
    "collections.defaultdict": mapping,
    **dict.fromkeys(_DICTS, OrderedDict),
}
