"""A fingerprint of the operators' schemas, so that a binary made for others is not loaded.

A C++ kernel takes its arguments from a stack, by position, as its schema was when it was compiled. With another schema it
reads values of the wrong type and crashes, which no error handling can catch. So setup.py compiles the fingerprint of the
schemas into the extension, and the loader reads it from the file and compares before the file is loaded.

It is a hash of what :func:`nvae_fast.ops._op.define_op` registered, and of the version. setup.py takes it in a process of its
own, with this package's operators imported and no extension.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re

from nvae_fast.version import __version__

_MARK = b"nvae_fast schemas "  # csrc/module.cpp puts it before the fingerprint
_LENGTH = 16
SCHEMAS: dict[str, str] = {}  # of every operator, by its name


def fingerprint() -> str:
    """Of the operators defined so far: of all of them, once ``nvae_fast.ops`` is imported."""
    schemas = sorted(name + schema for name, schema in SCHEMAS.items())
    # Which alias set an argument is in is PyTorch's name for it, and says nothing about the argument.
    text = re.sub(r"\(\w+!\)", "(!)", "\n".join([__version__, *schemas]))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def compiled_into(binary: str | os.PathLike[str]) -> str | None:
    """The fingerprint in a compiled extension, read from the file; None in one made before there were any."""
    with open(binary, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_MARK)
        if start < 0:
            return None
        start += len(_MARK)
        return content[start : start + _LENGTH].decode("ascii", "replace")
