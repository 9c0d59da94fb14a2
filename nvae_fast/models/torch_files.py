"""Reading files of torch.save that may be damaged or hostile, and writing files whose damage is noticed.

``torch.load(weights_only=True)`` runs no code of a file, but it ignores the checksums in it, expands what is compressed and
makes objects of any size that a few bytes ask for. :func:`read` checks all of that first, in memory that does not depend on
the file.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import os
import pickle
import re
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from nvae_fast.models import numpy_pickles, option_pickles, pickle_structure
from nvae_fast.models.pickle_structure import UnreadableFile

# Limit on the pickled part of a file, its structure without the numbers. The largest preset with its optimizer takes 3 MB.
MOST_PICKLED_BYTES = 1 << 25

_lock = threading.Lock()
_CHECKSUM = b"nvae_fast sha256 "
_BLOCK = 1 << 20
# How a file of torch.save without an archive begins (PyTorch before 1.6): a magic number and a protocol version, pickled.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_LEGACY_PICKLES = 5
_KINDS = (
    (
        re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.I),
        "an HTML or XML page, perhaps of a failed download",
    ),
    (re.compile(rb"version https://git-lfs"), "a git-lfs pointer: fetch the file itself with `git lfs pull`"),
    (
        re.compile(rb"/annex/objects/|(\.\./)*\.git/annex/"),
        "a git-annex pointer: fetch the file with `git annex get`",
    ),
    (
        re.compile(rb".{8}\{", re.S),
        "a safetensors file under another name: those of `convert` end in .safetensors",
    ),
    (re.compile(rb"\x1f\x8b"), "compressed by gzip: decompress it first"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "compressed by zstd: decompress it first"),
    (re.compile(rb"BZh"), "compressed by bzip2: decompress it first"),
    (re.compile(rb"\xfd7zXZ"), "compressed by xz: decompress it first"),
    (re.compile(rb"7z\xbc\xaf|Rar!"), "an archive: extract it first"),
    (re.compile(rb"\x89HDF"), "an HDF5 file"),
    (re.compile(rb"\x93NUMPY"), "a NumPy array"),
    (re.compile(rb".{257}ustar", re.S), "a tar archive"),
    (re.compile(rb"\x80[\x02-\x05]"), "a pickle that torch.save did not write, so it was not opened"),
)


class DamagedFile(UnreadableFile):
    """A file of torch.save that is truncated, or not what was written."""


def read(path: str | os.PathLike[str]) -> Any:
    """The object in the file ``path`` of torch.save, its tensors on the CPU; nothing in the file can run code.

    Files of PyTorch before 1.6 carry no checksums: where their tensors are damaged, it cannot be noticed.

    Raises:
        DamagedFile: it is truncated, or a checksum in it is wrong. UnreadableFile: it is something else, is compressed or
        encrypted, or names objects that are not plain data. OSError: it cannot be read, or there is not enough memory.
    """
    with open_regular(path) as handle, _damage(path):
        head = handle.read(512)
        if head.startswith(b"PK\x03\x04"):
            _check_archive(handle)
        elif head.startswith(_LEGACY):
            handle.seek(0)  # the tensors after the pickles carry no checksum
            pickle_structure.check(io.BytesIO(handle.read(MOST_PICKLED_BYTES)), _LEGACY_PICKLES)
        else:
            raise _something_else(head)
        handle.seek(0)
        data = {**numpy_pickles.GLOBALS, **option_pickles.GLOBALS}
        extra: list[Any] = [(value, name) for name, value in data.items()]
        extra.append((argparse.Namespace, "argparse.Namespace"))
        # The list of globals is shared by all threads.
        with _lock, torch.serialization.safe_globals(extra):
            document = torch.load(handle, map_location="cpu", weights_only=True)
        return numpy_pickles.unwrap(document)


@contextlib.contextmanager
def _damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Damage shows as whatever breaks first: zipfile, pickletools and torch.load raise errors of a dozen kinds."""
    try:
        yield
    except UnreadableFile:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error
        # A wrong offset in an archive is an invalid argument to the system.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise DamagedFile(f"is truncated or damaged: {_first_line(error)}") from error


def write(document: Any, handle: IO[bytes]) -> None:
    """Write ``document`` as torch.save does, with a SHA-256 of all of it as the comment of the archive."""
    hashing = _Hashing(handle)
    torch.save(document, hashing)  # type: ignore[arg-type]  # it writes and flushes only
    comment = _CHECKSUM + hashing.digest.hexdigest().encode()
    # An archive ends with the length of its comment, in two bytes.
    handle.seek(-2, os.SEEK_END)
    handle.write(len(comment).to_bytes(2, "little") + comment)


class _Hashing:
    """A file for writing that computes the checksum of what is written."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle
        self.digest = hashlib.sha256()
        self.flush = handle.flush

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.handle.write(data)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """``path`` open for reading. Raises UnreadableFile for a pipe or a device, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableFile("is no regular file")
    return Path(path).open("rb")


def _something_else(head: bytes) -> UnreadableFile:
    if not head:
        return DamagedFile("is truncated or damaged: it is empty")
    for pattern, kind in _KINDS:
        if pattern.match(head):
            return UnreadableFile(f"is not a checkpoint but {kind}")
    return DamagedFile(
        "is truncated or damaged, or not a checkpoint: it does not begin as files of torch.save do"
    )


def _check_archive(handle: IO[bytes]) -> None:
    with zipfile.ZipFile(handle) as archive:
        members = archive.infolist()
        whole = archive.comment.startswith(_CHECKSUM)
        if whole and archive.comment[len(_CHECKSUM) :] != _hash_before_comment(handle, archive.comment):
            raise DamagedFile("is truncated or damaged: its checksum is wrong")
        _check_members(members, os.fstat(handle.fileno()).st_size)
        if not whole:
            for member in members:
                with archive.open(member) as content:
                    while content.read(_BLOCK):
                        pass  # zipfile compares the checksum at the end
        for member in members:
            if _is_pickle(member):
                pickle_structure.check(io.BytesIO(archive.read(member)), 1)


def _is_pickle(member: zipfile.ZipInfo) -> bool:
    # PyTorch looks names up without regard to case.
    return member.filename.lower().endswith("data.pkl")


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Raise unless members are stored one after another, as torch.save writes them: all are no larger than the file."""
    for member in members:
        if member.flag_bits & 1:
            raise UnreadableFile("is not a checkpoint but an encrypted archive: extract it first")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise UnreadableFile(
                f"is not a checkpoint as torch.save writes it: {member.filename} is compressed in it "
                f"({member.compress_size} bytes for {member.file_size}), so it was not expanded"
            )
    if sum(member.file_size for member in members) > size:
        raise UnreadableFile("is not a checkpoint as torch.save writes it: parts of the archive overlap")
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise UnreadableFile("is not a checkpoint as torch.save writes it: names in the archive are repeated")
    pickled = [member for member in members if _is_pickle(member)]
    if not pickled:
        kind = "of NumPy arrays (.npz)" if any(name.endswith(".npy") for name in names) else "of other files"
        raise UnreadableFile(f"is not a checkpoint but an archive {kind}")
    for member in pickled:
        if member.file_size > MOST_PICKLED_BYTES:
            raise UnreadableFile(
                f"is not a checkpoint of an NVAE: its structure takes {member.file_size} bytes, at most "
                f"{MOST_PICKLED_BYTES} are read"
            )


def _hash_before_comment(handle: IO[bytes], comment: bytes) -> bytes:
    """SHA-256 of the file up to the comment of its archive, whose length counts as zero."""
    rest = os.fstat(handle.fileno()).st_size - len(comment) - 2
    digest = hashlib.sha256()
    handle.seek(0)
    while rest > 0 and (block := handle.read(min(_BLOCK, rest))):
        digest.update(block)
        rest -= len(block)
    digest.update(bytes(2))
    return digest.hexdigest().encode()


def _first_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        # PyTorch's own text advises weights_only=False, which would run the file's code.
        text = text.partition("WeightsUnpickler error:")[2]
    return text.strip().partition("\n")[0] or type(error).__name__
