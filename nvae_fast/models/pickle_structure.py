"""Bounds on pickles before they are read: what they name, how large they are, how much work their parts make.

A few bytes can ask for any amount of work: a tuple that holds a tuple twice, which holds one twice, and so on, takes time that
doubles with each level to hash, and deep nesting exhausts the stack of the process. :func:`check` follows the operations of a
pickle with the shapes of its containers in place of their values, and counts the work.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

import torch

from nvae_fast.models import numpy_pickles, option_pickles

# The largest preset with its optimizer takes 3 MB and 700,000 operations. An operation makes at most a few hundred bytes.
MOST_OPERATIONS = 2_000_000
# Parts of keys and of the arguments of constructors, counted as often as they are visited.
MOST_VISITS = 3_000_000
DEEPEST = 100

_STORAGES = (
    "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat", "ComplexDouble",
)  # fmt: skip
# The globals that a file may name: tensors, their parts, and plain containers. A subset of what torch.load takes, without
# those that make objects of any size, and with stand-ins for numbers of NumPy and for options.
GLOBALS = {
    "argparse.Namespace",
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.set",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    *(f"torch.{name}Storage" for name in _STORAGES),
    *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
    *numpy_pickles.GLOBALS,
    *option_pickles.GLOBALS,
}
# Encodings of bytes as longer bytes: applied again and again they grow without bound.
_GROWING = {
    "hex",
    "base64",
    "uu",
    "quopri",
    "quotedprintable",
    "quoted_printable",
    "base_64",
    "base64_codec",
    "hex_codec",
}


class UnreadableFile(ValueError):
    """A file is not what it should be; the message completes "the file ..."."""


def check(stream: io.BytesIO, count: int) -> None:
    """Raise UnreadableFile unless ``stream`` begins with ``count`` pickles of bounded work that name plain data alone."""
    operations, visits = 0, _Visits()
    globals_, growing = set(), set()
    for _ in range(count):
        shapes = _Shapes(visits)
        for operation, argument, _ in pickletools.genops(stream):
            operations += 1
            if operations > MOST_OPERATIONS:
                raise UnreadableFile(
                    f"is not a checkpoint of an NVAE: its structure has more than {MOST_OPERATIONS} parts"
                )
            if operation.name == "GLOBAL":
                globals_.add(_modern(str(argument)))
            elif isinstance(argument, str) and argument.lower().replace("-", "_") in _GROWING:
                growing.add(argument)
            shapes.follow(operation.name, argument)
    foreign = sorted(globals_ - GLOBALS)
    if foreign:
        raise UnreadableFile(
            f"holds objects that are not plain data ({foreign[0]:.100}), which could run code: refused. A checkpoint needs "
            "tensors, numbers and an argparse.Namespace only: where you trust the file and can import what it names, read it "
            "with torch.load(..., weights_only=False), put a dict of the options in place of its args, and save it again"
        )
    if growing and "_codecs.encode" in globals_:
        raise UnreadableFile(f"holds bytes encoded as {min(growing)}, which no checkpoint has: refused")


def _modern(name: str) -> str:
    """The global that a pickle of protocol 2 names as "module name", by its name in Python 3."""
    name = name.replace(" ", ".")
    return "builtins.int" if name == "__builtin__.long" else name.replace("__builtin__.", "builtins.")


class _Made:
    """The shape of what a constructor was asked for: its arguments, and what was put into it later."""

    __slots__ = ("given", "parts")

    def __init__(self, given: Any) -> None:
        self.given, self.parts = given, []  # type: tuple[Any, list[Any]]


class _Visits:
    """Counts the parts that hashing a key, or a constructor, visits."""

    def __init__(self) -> None:
        self.left = MOST_VISITS

    def count(self, shape: Any) -> None:
        """Count the parts of ``shape``: tuples and arguments at any depth; mutable containers, which have no hash and may hold
        themselves, as deep as a list of pairs."""
        depth, level = 0, [(shape, 0)]
        while level:
            depth += 1
            below: list[tuple[Any, int]] = []
            for part, mutable in level:
                if isinstance(part, _Made):
                    below.append((part.given, mutable))
                    part = part.parts
                if isinstance(part, tuple) or mutable < 2:
                    inside = mutable + isinstance(part, list)
                    self.left -= len(part) + 1
                    if self.left < 0:
                        break
                    below += [(child, inside) for child in part if child]
            level = below
            if self.left < 0 or depth > DEEPEST:
                raise UnreadableFile(
                    "is not a checkpoint of an NVAE: its keys or options hold the same parts again and again, or are nested "
                    f"more than {DEEPEST} deep"
                )


class _Shapes:
    """The stack and the memo of an unpickler with a list, a tuple or a _Made for every container, and None for all else."""

    def __init__(self, visits: _Visits) -> None:
        self.visits = visits
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        parts = self.stack[start:]
        del self.stack[start:]
        return parts

    def follow(self, name: str, argument: Any) -> None:
        """Do what the operation ``name`` does to the stack."""
        stack = self.stack
        if name in _SMALL:
            stack.append(None)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            start = len(stack) - int(name[-1])
            stack[start:] = [tuple(stack[start:])]
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "BINPERSID":
            self.visits.count(stack.pop())
            stack.append(None)
        elif name in ("REDUCE", "NEWOBJ"):
            given = stack.pop()
            if given:
                self.visits.count(given)
            stack[-1] = _Made(given)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name in ("APPEND", "SETITEM"):
            parts = [stack.pop() for _ in range(1 + (name == "SETITEM"))]
            self._extend(stack[-1], parts, keys=parts[1:])
        elif name in ("APPENDS", "SETITEMS"):
            parts = self._since_mark()
            self._extend(stack[-1], parts, keys=parts[::2] if name == "SETITEMS" else ())
        elif name == "BUILD":  # entries of a dict are copied with their hashes
            state = stack.pop()
            self.visits.left -= len(state) if isinstance(state, list | tuple) else 0
        elif name not in ("PROTO", "STOP"):
            raise UnreadableFile(
                f"is not a checkpoint as torch.save writes it: its structure uses the operation {name}"
            )

    def _extend(self, container: Any, parts: list[Any], keys: Any) -> None:
        for key in keys:
            if key:
                self.visits.count(key)
        # Nothing can be put into a tuple or a number: reading will say so.
        if isinstance(container, list | _Made):
            (container.parts if isinstance(container, _Made) else container).extend(parts)


_SMALL = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "GLOBAL",
}  # fmt: skip
