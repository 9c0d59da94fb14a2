"""Options of official checkpoints: what they are pickled as, what they lack, what the state says about them."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.models import torch_files

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parent / "data" / "options"
# Pickled by omegaconf 2.4, munch 4.0, easydict 1.14, yacs 0.1.8, addict 2.4 and ml_collections 1.1.
PICKLED = {
    "dataset": "celeba_64",
    "num_nf": 0,
    "use_se": True,
    "learning_rate": 1e-2,
    "list": [1, {"a": "x"}],
    "inner": {"e": 1.5, "deep": {"g": None}},
}


@pytest.fixture(scope="module")
def model() -> nf.NVAE:
    return tiny_model()


def options(model: nf.NVAE, **changes: Any) -> dict[str, Any]:
    known = {key: value for key, value in model.config.to_dict().items() if value is not None}
    return {key: value for key, value in {**known, **changes}.items() if value is not ...}


def write(path: Path, model: nf.NVAE, args: Any, prefix: str = "") -> Path:
    state = {prefix + key: value for key, value in model.official_state_dict().items()}
    document = {"state_dict": state, "args": args}
    torch.save({key: value for key, value in document.items() if value is not ...}, path)
    return path


def load(path: Path, **given: Any) -> nf.NVAE:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return nf.load_official(path, **given)


def archive(path: Path, pickled: bytes) -> Path:
    """A file of torch.save without tensors."""
    with zipfile.ZipFile(path, "w") as out:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            out.writestr(f"archive/{name}", content)
    return path


# What options are pickled as.


@pytest.mark.parametrize(
    "value",
    [
        pathlib.PurePosixPath("/runs/a"),
        pathlib.PureWindowsPath("C:/runs"),
        pathlib.Path("/runs/a"),
        types.SimpleNamespace(a=1, b=types.SimpleNamespace(c=[2])),
        {1, 2},
        frozenset("a"),
        np.int64(3),
        np.array(3),
        torch.tensor(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_options_of_other_kinds_are_data(tmp_path: Path, model: nf.NVAE, value: Any) -> None:
    args = argparse.Namespace(**options(model), extra=[value])
    assert load(write(tmp_path / "a.pt", model, args)).config == model.config
    (found,) = torch_files.read(tmp_path / "a.pt")["args"].extra
    if isinstance(value, pathlib.PurePath):
        pure = pathlib.PurePath(value) if isinstance(value, pathlib.Path) else value
        assert type(found) is type(pure)
        assert found == pure
    elif isinstance(value, types.SimpleNamespace):
        assert found == argparse.Namespace(a=1, b=argparse.Namespace(c=[2]))
    elif isinstance(value, set | frozenset):
        assert set(found) == value
    else:
        assert found == value


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_every_python_version(tmp_path: Path, module: str) -> None:
    pickled = pickle.dumps(pathlib.PurePosixPath("/a/b"), 2)
    pickled = pickled.replace(b"cpathlib._local\n", b"cpathlib\n").replace(
        b"cpathlib\n", f"c{module}\n".encode()
    )
    assert torch_files.read(archive(tmp_path / "file.pt", pickled)) == pathlib.PurePosixPath("/a/b")


@pytest.mark.parametrize("name", [path.stem for path in sorted(DATA.glob("*.pkl"))])
def test_configuration_objects_are_data(tmp_path: Path, name: str) -> None:
    """Pickles that the libraries themselves wrote; they are not installed here."""
    file = archive(tmp_path / "file.pt", (DATA / f"{name}.pkl").read_bytes())
    assert torch_files.read(file) == PICKLED


@pytest.mark.parametrize("kind", [types.SimpleNamespace, argparse.Namespace, dict])
def test_kinds_of_args(tmp_path: Path, model: nf.NVAE, kind: Any) -> None:
    assert load(write(tmp_path / "a.pt", model, kind(**options(model)))).config == model.config


def test_numbers_of_other_types(tmp_path: Path, model: nf.NVAE) -> None:
    known = options(model)
    for convert in (float, np.int32, np.float64, np.array, torch.tensor, lambda v: torch.tensor(float(v))):
        args = {key: convert(value) if type(value) is int else value for key, value in known.items()}
        assert load(write(tmp_path / "a.pt", model, args)).config == model.config
        assert {type(v) for v in nf.NVAEConfig.from_official(args).to_dict().values()} <= {
            int, bool, str, type(None),
        }  # fmt: skip
    for wrong in (2.5, float("nan"), "2", np.array([2])):
        with pytest.raises(ValueError, match=r"a\.pt: NVAEConfig: num_latent_per_group must be int, got"):
            load(write(tmp_path / "a.pt", model, options(model, num_latent_per_group=wrong)))


class Unknown:
    def __init__(self) -> None:
        self.a = 1


def test_other_objects_are_refused_with_what_to_do(tmp_path: Path, model: nf.NVAE) -> None:
    write(tmp_path / "a.pt", model, argparse.Namespace(**options(model), extra=Unknown()))
    with pytest.raises(
        ValueError, match=r"a\.pt holds objects .*\(test_official_options\.Unknown\).*refused.*a dict"
    ):
        nf.load_official(tmp_path / "a.pt")


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        Call(pathlib.PurePosixPath, 3),
        Call(pathlib.PurePosixPath, ["a"]),
        Call(frozenset, "abc"),
        Call(dict, [(1, 2)]),
        Call(list, [1]),
        Call(bytes, 1 << 40),
        Call(int, "9" * 10),
        Call(types.SimpleNamespace, 1),
    ],
    ids=lambda call: call.call[0].__name__,
)
def test_stand_ins_construct_nothing_else(tmp_path: Path, call: Call) -> None:
    torch.save({"state_dict": {}, "args": {"extra": call}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is truncated or damaged"):
        nf.load_official(tmp_path / "a.pt")


# What options lack.


def test_keywords_complete_and_replace_args(tmp_path: Path, model: nf.NVAE) -> None:
    path = write(tmp_path / "a.pt", model, options(model, num_latent_per_group=..., dataset="unknown_set"))
    wanted = {"num_latent_per_group": model.config.num_latent_per_group, "dataset": model.config.dataset}
    with pytest.raises(ValueError, match=r"a\.pt: NVAEConfig: dataset must be one of"):
        load(path)
    with pytest.raises(
        ValueError,
        match=r"shapes that differ.*; its args lack num_latent_per_group: assumed num_latent_per_group=20; give others as "
        r"load_official\(path, num_latent_per_group=\.\.\.\)",
    ):
        load(path, dataset=wanted["dataset"])
    assert load(path, **wanted).config == model.config
    for file in (path, tmp_path / "absent.pt"):  # before a file is read
        with pytest.raises(TypeError, match=r"there are no options \['num_latents'\], expected some of"):
            load(file, num_latents=3)


def test_a_file_without_args(tmp_path: Path, model: nf.NVAE) -> None:
    path = write(tmp_path / "a.pt", model, ...)
    with pytest.raises(ValueError, match=r"must hold a dict with the keys \['state_dict', 'args'\]"):
        load(path)
    assert load(path, **options(model)).config == model.config


@pytest.mark.parametrize(
    ("dataset", "absent", "said"),
    [
        ("cifar10", ["res_dist"], "res_dist=True"),
        ("cifar10", ["num_x_bits"], "num_x_bits=8"),
        ("cifar10", ["res_dist", "num_x_bits"], "res_dist=True, num_x_bits=8"),
        ("mnist", ["num_x_bits"], None),
        ("mnist", ["dataset"], "dataset='mnist'"),
        ("cifar10", ["ada_groups", "min_groups_per_scale", "num_mixture_dec"], None),
    ],
)
def test_what_is_assumed_and_not_in_the_state_is_said(
    tmp_path: Path, dataset: str, absent: list[str], said: str | None
) -> None:
    model = nf.NVAE(tiny_model().config.replace(dataset=dataset, num_mixture_dec=10))
    path = write(tmp_path / "a.pt", model, options(model, **dict.fromkeys(absent, ...)))
    if said is None:
        assert load(path).config == model.config
        return
    with pytest.warns(
        UserWarning, match=rf"a\.pt: its args lack {', '.join(absent)}: assumed {said}; give others"
    ):
        assert nf.load_official(path).config == model.config
    load(path, **{name: getattr(model.config, name) for name in absent})


def test_a_dataset_that_does_not_fit_the_state(tmp_path: Path) -> None:
    """The state shows the size and the channels of the images."""
    model = nf.NVAE(tiny_model().config.replace(dataset="cifar10"))
    path = write(tmp_path / "a.pt", model, options(model, dataset=...))
    with pytest.raises(ValueError, match=r"stem\.weight.*its args lack dataset: assumed dataset='mnist'"):
        load(path)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("place", ["bedroom", "church", "tower"])
def test_lsun_and_imagenet_64_names(place: str, size: int) -> None:
    config = nf.NVAEConfig.from_official({"dataset": f"lsun_{place}_{size}"})
    assert (config.resolution, config.channels, config.likelihood_name) == (size, 3, "mixture_logistic")
    assert nf.NVAEConfig.from_official({"dataset": "imagenet_64"}).resolution == 64


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.module.", "_orig_mod.module.module."]
)
def test_prefixes(tmp_path: Path, model: nf.NVAE, prefix: str) -> None:
    back = load(write(tmp_path / "a.pt", model, options(model), prefix))
    assert torch.equal(back.stem.weight, model.stem.weight)


# Pickles whose parts make unbounded work.


def shared(levels: int) -> tuple[Any, ...]:
    """A tuple whose hash takes 2^levels steps."""
    value: tuple[Any, ...] = ()
    for _ in range(levels):
        value = (value, value)
    return value


def chain(length: int) -> bytes:
    """The pickle of a dict whose key is that many tuples, one inside another: its hash exhausts the stack."""
    return b"\x80\x02}(" + b")" + b"\x85" * length + b"K\x01u."


def nested_key(value: Any) -> bytes:
    """A dict with ``value`` as a key, pickled without computing its hash."""
    inner = pickle.dumps(value, 2)[2:-1]
    return b"\x80\x02}(" + inner + b"K\x01u."


def pairs(value: Any) -> bytes:
    """An OrderedDict constructed from a list of pairs, the first of each ``value``."""
    inner = pickle.dumps([[value, 1], (value, 1)], 2)[2:-1]
    return b"\x80\x02ccollections\nOrderedDict\n" + inner + b"\x85R."


def copies(length: int, count: int) -> bytes:
    """A list of one long list and that many constructors which copy it."""
    counter = b"ccollections\nCounter\nh\x00\x85R"
    return b"\x80\x02](](" + b"K\x01" * length + b"eq\x00" + counter * count + b"e."


@pytest.mark.parametrize(
    "content",
    [
        nested_key(shared(60)),
        pairs(shared(60)),
        chain(300_000),
        copies(100_000, 100),
    ],
    ids=["key", "pairs", "chain", "copies"],
)
def test_work_is_bounded(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(torch_files.UnreadableFile, match="the same parts again and again, or are nested"):
        torch_files.read(archive(tmp_path / "file.pt", content))


def test_ordinary_nesting_is_read(tmp_path: Path) -> None:
    for content, expected in (
        (nested_key((1, (2, (3, ())))), {(1, (2, (3, ()))): 1}),
        (pairs("a"), {"a": 1}),
        (copies(100, 3), [[1] * 100] + 3 * [{1: 100}]),
    ):
        assert torch_files.read(archive(tmp_path / "file.pt", content)) == expected
