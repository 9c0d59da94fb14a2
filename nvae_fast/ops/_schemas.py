"""A fingerprint of the operators' schemas, so that a binary made for others is not loaded.

A C++ kernel takes its arguments from a stack, by position, as its schema was when it was compiled. With another schema it
reads values of the wrong type and crashes, which no error handling can catch. So setup.py compiles the fingerprint of the
schemas into the extension, and the loader reads it from the file and compares before the file is loaded.

The fingerprint is taken from the text of the rooms, so that setup.py need not import PyTorch; tests/test_extension.py holds
that text against what the dispatcher knows. It changes with the version too. Nothing of the package is imported here.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_MARK = b"nvae_fast schemas "  # csrc/module.cpp puts it before the fingerprint
_LENGTH = 16
# Adjacent literals, of which the first opens a parenthesis and some part has the arrow: how every schema is written.
_LITERALS = re.compile(r'"\w*\([^"\n]*"(?:\s*"[^"\n]*")*')


def texts(folder: Path = _HERE) -> list[tuple[str, str]]:
    """(file, schema) of every schema written in the rooms of ``folder``, some with their operator's name in front."""
    found = []
    for page in sorted(folder.glob("*.py")):
        for literals in _LITERALS.findall(page.read_text(encoding="utf-8")):
            text = "".join(re.findall(r'"([^"]*)"', literals))
            if ") -> " in text and "Tensor" in text and "..." not in text:
                found.append((page.name, text))
    return found


def expected(folder: Path = _HERE) -> str | None:
    """The fingerprint of this source tree; None where the package was installed without its source files."""
    schemas, page = texts(folder), folder.parent / "version.py"
    if not schemas or not page.is_file():
        return None
    version = re.findall(r'^__version__ = "(.*)"$', page.read_text(encoding="utf-8"), re.MULTILINE)
    words = "\n".join([*version, *map(" ".join, schemas)])
    return hashlib.sha256(words.encode()).hexdigest()[:_LENGTH]


def compiled_into(binary: str | os.PathLike[str]) -> str | None:
    """The fingerprint in a compiled extension, read from the file; None in one made before there were any."""
    with open(binary, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_MARK)
        if start < 0:
            return None
        start += len(_MARK)
        return content[start : start + _LENGTH].decode("ascii", "replace")
