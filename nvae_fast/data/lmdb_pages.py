"""Check the pages of an LMDB file before the library maps it.

The library reads a file through a memory map and trusts what its pages say. A page that points outside of the file ends the
process with SIGBUS or SIGSEGV. Here every page of the tree is read with plain reads, and every place that it
points to must be inside of the file. Values themselves are not read.

A page is: number (8 bytes), pad (2), flags (2), end of the node pointers (2), start of the nodes (2), the
pointers (2 each), nodes. A node is: two 2-byte words, flags (2), key length (2), key, value. The words of a branch are
the low 32 bits of a page number, with the flags as bits 32 to 47; those of a leaf are the length of the value.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from . import contents

_HEADER = 16
_NODE = 8
_BRANCH, _LEAF, _META = 0x01, 0x02, 0x08
_ON_OTHER_PAGES = 0x01  # the value is the number of the first of the pages that hold it
_MAGIC = 0xBEEFC0DE
_NONE = 2**64 - 1
# Magic, version, address, map size, two trees, last page, transaction.
_META_FORMAT = "<IIQQ" + "IHHQQQQQ" * 2 + "QQ"


def check_file(path: Path) -> None:
    """Raise ValueError that names the file unless every page of its tree points inside of it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        page_size, last, root, entries = _newest(file.fileno(), size, path)
        needed = (last + 1) * page_size
        if size < needed:
            raise ValueError(f"{path}: truncated, {size} of at least {needed} bytes; copy it again")
        seen: set[int] = set()
        waiting = [] if root == _NONE else [root]
        found = 0
        while waiting:
            number = waiting.pop()
            if number in seen or not 1 < number <= last:
                raise ValueError(_damaged(path, f"a page points to page {number} of {last + 1}"))
            seen.add(number)
            page = os.pread(file.fileno(), page_size, number * page_size)
            below, values = _nodes(page, number, path, page_size, last)
            waiting.extend(below)
            found += values
        if found != entries:
            raise ValueError(_damaged(path, f"{entries} entries expected, {found} found"))


def _damaged(path: Path, what: str) -> str:
    return f"{path}: cannot be opened as an LMDB database: damaged, {what}; copy it again"


def _newest(file: int, size: int, path: Path) -> tuple[int, int, int, int]:
    """(page size, last page, root, entries) of the newer of the two meta pages."""
    best: tuple[int, ...] | None = None
    page_size = 4096
    for number in (0, 1):
        data = os.pread(file, _HEADER + struct.calcsize(_META_FORMAT), number * page_size)
        if len(data) < _HEADER + struct.calcsize(_META_FORMAT):
            break
        values = struct.unpack_from(_META_FORMAT, data, _HEADER)
        if values[0] != _MAGIC or not struct.unpack_from("<H", data, 10)[0] & _META:
            break
        page_size = values[4]
        if page_size not in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
            break
        if best is None or values[-1] > best[-1]:
            best = values
    else:
        assert best is not None
        return page_size, best[-2], best[19], best[18]
    raise ValueError(
        f"{path}: cannot be opened as an LMDB database: damaged, or truncated: {size} bytes without two meta pages"
        + contents.but_it_is(os.pread(file, contents.HEAD, 0))
    )


def _nodes(page: bytes, number: int, path: Path, page_size: int, last: int) -> tuple[list[int], int]:
    """The pages below a page, and how many values it holds, after checking where its nodes point to."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(_damaged(path, f"page {number}: {what}"))

    require(len(page) == page_size, "cannot be read")
    own, _, flags, lower, upper = struct.unpack_from("<QHHHH", page)
    require(own == number, f"says that it is page {own}")
    kind = flags & 0x7F
    require(kind in (_BRANCH, _LEAF), f"has the flags {flags:#x}")
    require(_HEADER <= lower <= upper <= page_size and lower % 2 == 0, "has wrong bounds")
    data = np.frombuffer(page, dtype=np.uint8)
    at = np.frombuffer(page, dtype="<u2", count=(lower - _HEADER) // 2, offset=_HEADER).astype(np.int64)
    require(bool(((at >= upper) & (at + _NODE <= page_size)).all()), "points outside of itself")
    fields = np.ascontiguousarray(data[at[:, None] + np.arange(_NODE)]).view("<u2").astype(np.int64)
    low, high, node_flags, key = fields.T
    word = low | high << 16
    if kind == _BRANCH:
        require(bool((at + _NODE + key <= page_size).all()), "has a key that does not fit")
        return (word | node_flags << 32).tolist(), 0
    outside = node_flags & _ON_OTHER_PAGES != 0
    end = at + _NODE + key + np.where(outside, 8, word)
    require(bool((end <= page_size).all()), "has a value that does not fit")
    if outside.any():
        begin = (at + _NODE + key)[outside]
        first = np.ascontiguousarray(data[begin[:, None] + np.arange(8)]).view("<u8")[:, 0]
        require(bool((first <= last).all()), f"has a value outside of the {last + 1} pages")
        pages = (_HEADER + word[outside] + page_size - 1) // page_size
        ends = first.astype(np.int64) + pages
        require(bool((ends <= last + 1).all()), "has a value that ends outside of the file")
    return [], len(at)
