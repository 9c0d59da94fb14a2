"""Files made to mislead, to block or to fill the memory, and drives that go away: a clear error that names the file."""

from __future__ import annotations

import errno
import gzip
import io
import os
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_files import as_bytes, image_folder, png_bytes, random_pixels, write_lmdb

from nvae_fast.data import folder as folder_module
from nvae_fast.data import open_dataset, retry
from nvae_fast.data.decode import open_image

HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0))


# ---------------------------------------------------------------- a drive that goes away


def failing(monkeypatch, number: int, times: int, only: str = ""):
    """Make the opening of image files fail so many times."""
    left, original = [times], open

    def broken(file, *arguments, **options):
        if str(file).endswith((".png", ".mdb")) and only in str(file) and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(file))
        return original(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", broken)


IO_ERRORS = [
    getattr(errno, n) for n in ("ENOENT", "EIO", "ESTALE", "EACCES", "ETIMEDOUT", "ENOTCONN", "EPERM")
]


@pytest.mark.parametrize("number", IO_ERRORS)
def test_an_io_error_is_not_a_damaged_image(tmp_path, monkeypatch, impatient, number):
    pixels = image_folder(tmp_path, 12)
    dataset = open_dataset(tmp_path)
    with monkeypatch.context() as patch:
        failing(patch, number, 99)
        with pytest.raises(
            OSError, match=rf"\[Errno {number}\] .*00\d\.png: .*tried 3 times.*No image was skipped"
        ):
            dataset.batch(range(12), 0)
    assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))
    assert dataset.skipped == []


def test_a_short_interruption_is_waited_for(tmp_path, monkeypatch, impatient, caplog):
    pixels = image_folder(tmp_path, 12)
    with monkeypatch.context() as patch:
        failing(patch, errno.ESTALE, 2)
        dataset = open_dataset(tmp_path)
    with monkeypatch.context() as patch:
        failing(patch, errno.EIO, 2)
        assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))
    assert caplog.text.count("trying again") == 4


@pytest.mark.parametrize("number", IO_ERRORS)
def test_opening_does_not_leave_files_out(tmp_path, monkeypatch, impatient, number):
    image_folder(tmp_path, 12)
    with monkeypatch.context() as patch:
        failing(patch, number, 99, only="003.png")
        with pytest.raises(OSError, match=r"003\.png"):
            open_dataset(tmp_path)
    original = os.scandir

    def broken(path):
        if str(path).endswith("/b"):
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    monkeypatch.setattr(folder_module.os, "scandir", broken)
    with pytest.raises(OSError, match=r"/b: .*No image was skipped"):
        open_dataset(tmp_path)


def test_an_lmdb_that_goes_away(tmp_path, monkeypatch, impatient):
    pixels = random_pixels(12, 8, 8, 3)
    write_lmdb(tmp_path / "db", [p.tobytes() for p in pixels])
    with monkeypatch.context() as patch:
        failing(patch, errno.EIO, 99)
        with pytest.raises(OSError, match=r"data\.mdb: .*tried 3 times"):
            open_dataset(tmp_path / "db")
    dataset = open_dataset(tmp_path / "db")
    os.rename(tmp_path / "db", tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"data\.mdb: .*tried 3 times"):
        dataset.batch(range(12), 0)
    os.rename(tmp_path / "away", tmp_path / "db")
    assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))
    assert dataset.skipped == []


def test_a_large_array_that_goes_away(tmp_path, monkeypatch, impatient):
    monkeypatch.setattr("nvae_fast.data.arrays._IN_MEMORY", 100)
    for shape in ((12, 8, 8, 3), (12, 28, 28), (12, 3, 8, 8)):
        pixels = random_pixels(*shape)
        np.save(tmp_path / "x.npy", pixels)
        dataset = open_dataset(tmp_path / "x.npy", binarize=False)
        assert not isinstance(dataset.source.pixels, np.ndarray)
        whole = as_bytes(dataset)
        monkeypatch.setattr("nvae_fast.data.arrays._IN_MEMORY", 1 << 20)
        assert np.array_equal(whole, as_bytes(open_dataset(tmp_path / "x.npy", binarize=False)))
        monkeypatch.setattr("nvae_fast.data.arrays._IN_MEMORY", 100)
        os.rename(tmp_path / "x.npy", tmp_path / "away.npy")
        with pytest.raises(FileNotFoundError, match=r"x\.npy: .*tried 3 times"):
            dataset.batch([3], 0)
        os.rename(tmp_path / "away.npy", tmp_path / "x.npy")
        assert np.array_equal(as_bytes(dataset), whole)


# ---------------------------------------------------------------- damaged images: few are skipped


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_more_damaged_images_than_the_share_stop(tmp_path):
    image_folder(tmp_path, 40)
    files = sorted(tmp_path.rglob("*.png"))
    damage(files[7])
    dataset = open_dataset(tmp_path)
    assert len(np.unique(as_bytes(dataset).reshape(40, -1), axis=0)) == 39
    damage(files[11])
    dataset = open_dataset(tmp_path)
    for _ in range(2):  # the second time as well
        with pytest.raises(
            ValueError,
            match=r"2 of 40 images cannot be read, more than the 1 that max_skipped=0.01.*007\.png",
        ):
            dataset.batch(range(40), 0)
    assert len(open_dataset(tmp_path, max_skipped=0.05).batch(range(40), 0)) == 40
    with pytest.raises(ValueError, match="more than the 0 that max_skipped=0 "):
        open_dataset(tmp_path, max_skipped=0).batch(range(40), 0)
    files[3].write_bytes(HTML)  # noticed when the folder is opened
    files[4].write_bytes(LFS)
    with pytest.raises(ValueError, match=r"2 of 40 .*003\.png: not an image file but an HTML page"):
        open_dataset(tmp_path)


def test_damaged_values_of_an_lmdb(tmp_path):
    values = [png_bytes(p) for p in random_pixels(40, 8, 8, 3)]
    write_lmdb(tmp_path / "first", [values[0][:60], *values[1:]])
    dataset = open_dataset(tmp_path / "first")
    assert np.array_equal(as_bytes(dataset)[0], as_bytes(dataset)[1])
    assert dataset.skipped[0][0].endswith("first, key '0'")
    write_lmdb(tmp_path / "two", [HTML, values[1][:40], *values[2:]])
    with pytest.raises(ValueError, match=r"two: the value of key '0' has .* bytes, neither .*an HTML page"):
        open_dataset(tmp_path / "two")
    write_lmdb(tmp_path / "head", [values[0][:20], values[1][:20]])
    with pytest.raises(ValueError, match=r"head, key '0': damaged image: OSError"):
        open_dataset(tmp_path / "head")


@pytest.mark.parametrize(
    ("value", "kind"), [(-0.1, ValueError), (1.5, ValueError), ("1%", TypeError), (True, TypeError)]
)
def test_max_skipped_is_checked(tmp_path, value, kind):
    with pytest.raises(kind, match="max_skipped"):
        open_dataset("digits", max_skipped=value)


# ---------------------------------------------------------------- files of other kinds


def test_pipes_sockets_devices_and_links_among_images(tmp_path, impatient):
    image_folder(tmp_path, 4)
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)
        server.bind("socket.jpg")
        os.chdir(here)
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path)
    dataset = open_dataset(tmp_path, max_skipped=0.9)
    assert len(dataset) == 4
    assert {Path(file).name: reason for file, reason in dataset.skipped} == {
        "pipe.png": "a named pipe, not a file",
        "socket.jpg": "a socket, not a file",
        "device.png": "a character device, not a file",
    }
    with pytest.raises(ValueError, match=r"pipe\.png: expected a file, got a named pipe"):
        open_dataset(tmp_path / "pipe.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        open_dataset(tmp_path, max_skipped=0.9)
    (tmp_path / "a" / "gone.png").unlink()
    (tmp_path / "self.png").symlink_to("self.png")
    with pytest.raises(OSError, match=r"self\.png"):
        open_dataset(tmp_path, max_skipped=0.9)


def test_deep_folders(tmp_path):
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("x.png").write_bytes(png_bytes(random_pixels(8, 8, 3)))
        os.chdir(here)
        assert len(open_dataset(tmp_path)) == 1
    finally:
        os.chdir(here)
        _remove_nested(tmp_path)


def _remove_nested(folder: Path) -> None:
    """Remove the chain of folders d/d/d/...: shutil.rmtree, and so pytest, calls itself for each."""
    here, depth = os.getcwd(), 0
    os.chdir(folder)
    while os.path.isdir("d"):
        os.chdir("d")
        depth += 1
    Path("x.png").unlink(missing_ok=True)
    for _ in range(depth):
        os.chdir("..")
        os.rmdir("d")
    os.chdir(here)


def test_every_ending_that_pillow_reads(tmp_path):
    image = pytest.importorskip("PIL.Image")
    features = pytest.importorskip("PIL.features")
    picture = image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    endings = {
        ".jfif": "JPEG",
        ".jpe": "JPEG",
        ".webp": "WEBP",
        ".bmp": "BMP",
        ".TIF": "TIFF",
        ".j2k": "JPEG2000",
    }
    if features.check("avif"):
        endings[".avif"] = "AVIF"
    for ending, kind in endings.items():
        picture.save(tmp_path / f"x{ending}", kind)
    x = as_bytes(open_dataset(tmp_path))
    assert x.shape == (len(endings), 3, 8, 8)
    assert np.abs(x.astype(int) - 100).max() <= 3


def test_no_other_format_is_tried(tmp_path):
    """PostScript would start Ghostscript."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(ValueError, match=r"x\.png.*not an image file but a PostScript document"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"), [(HTML, "an HTML page"), (LFS, "a git-lfs pointer"), (b"", "empty")]
)
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.gz", "train-images-idx3-ubyte.gz", "data_batch_1.bin"])
def test_pages_and_pointers_are_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name}.*{what if name != 'data_batch_1.bin' or content else '0 bytes'}"
    ):
        open_dataset(tmp_path / name)


@pytest.mark.parametrize("name", ["x.png", "train.lmdb", "chardata.mat"])
def test_pages_in_a_folder_are_named(tmp_path, name):
    for content, what in ((HTML, "an HTML page"), (LFS, "a git-lfs pointer")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*{what}"):
            open_dataset(tmp_path)


def test_a_page_in_gzip(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(HTML))
    with pytest.raises(ValueError, match=r"x\.gz: wrong magic number 3c21444f.*an HTML page"):
        open_dataset(tmp_path / "x.gz")


# ---------------------------------------------------------------- headers that are not true


def npy(shape: str, descr: str = "'|u1'", body: bytes = bytes(192), fortran: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1000000000000, 8, 8, 3)"), r"header is wrong: the shape \(1000000000000, 8, 8, 3\) needs"),
        (npy("(2, 8, 8, 3)"), "needs 512 bytes, the file has 320"),
        (npy("(-1, 8, 8, 3)"), "negative length"),
        (npy("(1, 8, 8, 3)", "'|O'"), "Python objects .*could run any program"),
        (npy("(1,)", "[('a', '|u1'), ('b', '<f4')]"), "got .*; save the images as one uint8 array"),
        (npy("(1, 8, 8, 3)", "'nonsense'"), "cannot be read as a numpy file"),
        (npy("__import__('os').abort()"), "cannot be read as a numpy file"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "format version"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(100), "cannot be read as a numpy file"),
        (b"\x93NUMPY", "cannot be read as a numpy file"),
    ],
)
def test_npy_headers(tmp_path, content, message):
    (tmp_path / "x.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            open_dataset(tmp_path / name)


def refusal(path: Path) -> str:
    """What is said about a file; its own name and a colon where nothing is wrong."""
    try:
        open_dataset(path)
    except ValueError as error:
        return str(error)
    return f"{path}: "


def test_wrong_offsets_in_a_zip_archive(tmp_path):
    """Some make zipfile seek to a negative position, an OSError that names nothing."""
    np.savez(tmp_path / "x.npz", random_pixels(3, 8, 8, 3))
    whole = (tmp_path / "x.npz").read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    for at in range(end, len(whole)):
        for value in (0, 255):
            (tmp_path / "x.npz").write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            assert refusal(tmp_path / "x.npz").startswith(f"{tmp_path / 'x.npz'}: ")


def test_fortran_order(tmp_path):
    pixels = random_pixels(3, 8, 8, 3)
    np.save(tmp_path / "x.npy", np.asfortranarray(pixels))
    np.savez(tmp_path / "x.npz", np.asfortranarray(pixels))
    for name in ("x.npy", "x.npz"):
        assert np.array_equal(as_bytes(open_dataset(tmp_path / name)), pixels.transpose(0, 3, 1, 2))


def test_zip_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"other\.npz: .*without \.npy arrays.*readme\.txt"):
        open_dataset(tmp_path / "other.npz")
    np.savez(tmp_path / "x.npz", random_pixels(3, 8, 8, 3))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption, in the directory
    data[6] |= 1
    (tmp_path / "locked.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"locked\.npz: .*encrypted"):
        open_dataset(tmp_path / "locked.npz")


# ---------------------------------------------------------------- bombs


def bombs(folder: Path) -> list[Path]:
    """Small files that ask for gigabytes."""
    folder.mkdir()
    zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
    with open(folder / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(zeros.compress(b"\0\0\x08\x03" + struct.pack(">3I", 1 << 21, 32, 32)))
        for _ in range(32):  # as many bytes as a header of 2 GB says would need 2048
            file.write(zeros.compress(bytes(1 << 20)))
        file.write(zeros.flush())
    with (
        zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(npy("(131072, 32, 32)", body=b""))
        for _ in range(128):
            entry.write(bytes(1 << 20))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for name, side in (("a", 10000), ("b", 60000)):
        (folder / name).mkdir()
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        (folder / name / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))
    (folder / "sparse").mkdir()
    with open(folder / "sparse" / "x.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(1 << 33)
    (folder / "array.npy").write_bytes(npy("(8388608, 32, 32)", body=b""))
    os.truncate(folder / "array.npy", (1 << 33) + 128)
    return [folder / n for n in ("train-images-idx3-ubyte.gz", "x.npz", "a", "b", "sparse", "array.npy")]


def test_bombs_take_little_memory(tmp_path):
    """All in one process, whose peak is that of the worst."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads the peak of memory through /proc")
    paths = [str(path) for path in bombs(tmp_path / "bombs")]
    code = (
        "import sys, pathlib\nfrom nvae_fast.data import open_dataset\nimport PIL.Image, lmdb\n"
        # getrusage would begin with the peak of the process that started this one.
        "def peak():\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(text.split('VmHWM:')[1].split()[0]) // 1024\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    try: open_dataset(path); print('opened', path)\n"
        "    except ValueError as error: print('refused', error)\n"
        "    print('grew', peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert max(int(line.split()[1]) for line in lines if line.startswith("grew")) < 500, run.stdout
    answers = [line for line in lines if not line.startswith("grew")]
    for path, answer in zip(paths, answers, strict=True):
        assert path in answer
    assert "pixels, more than the" in answers[2]
    assert "pixels, more than the" in answers[3] or "DecompressionBomb" in answers[3]
    assert [answer.split()[0] for answer in answers] == ["refused"] * 5 + ["opened"], run.stdout


def test_formats_whose_decoder_keeps_copies_have_a_lower_bound():
    image = pytest.importorskip("PIL.Image")
    data = io.BytesIO()
    image.new("RGB", (5000, 4001)).save(data, "WEBP", quality=0, method=0)
    with pytest.raises(ValueError, match="5000x4001 pixels, more than the 20000000 that are decoded"):
        open_image(data.getvalue())
