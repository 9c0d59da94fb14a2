"""What a file is, in words for error messages: by its type on disk and by its first bytes."""

from __future__ import annotations

import os
import stat


class MissingSplit(FileNotFoundError, ValueError):
    """The data have other parts, but not the one asked for."""


HEAD = 64  # bytes that `describe` wants to see

_SIGNATURES = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the file (git lfs pull fetches it)"),
    (b"\x93NUMPY", "a .npy array"),
    (b"PK\x03\x04", "a zip archive (.npz and .pt are such)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\x7fELF", "a program"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\xfd7zXZ", "xz data"),
    (b"BZh", "bzip2 data"),
    (b"\x89HDF", "an HDF5 file"),
)


def describe(head: bytes) -> str:
    """What a file with the first bytes `head` is, or "" when they say nothing."""
    if not head:
        return "an empty file"
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        return "an HTML page instead of the file (a download that failed?)"
    if text.startswith((b"<?xml", b"<svg")):
        return "an XML text"
    if text.startswith(b"{"):
        return "a JSON text"
    if not any(head):
        return "zeros only"
    return ""


def but_it_is(head: bytes) -> str:
    """`describe(head)` as the end of a message: " (this is ...)", or "" when the bytes say nothing."""
    what = describe(head)
    return f" (this is {what})" if what else ""


def irregular(mode: int) -> str:
    """What a path with this `st_mode` is when it is neither a file nor a folder, else ""."""
    for test, what in (
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return what
    return ""


def check_regular(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a regular file. ValueError names anything else, before an open that would block."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        what = irregular(found.st_mode) or "a folder"
        raise ValueError(f"{os.fspath(path)}: expected a file, got {what}")
    return found.st_size
