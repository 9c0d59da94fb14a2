"""Starting points of training: weights of another checkpoint, options of a file, numbered checkpoints, skipped steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from training_runs import TINY, TINY_TRAINING, tiny_model, trainer

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.cli import config_file
from nvae_fast.training import TrainingConfig, checkpoint, init_from, kl_coefficient, metrics
from nvae_fast.training.step import layers_needing_data_init

pytestmark = pytest.mark.usefixtures("one_thread")

ELU = {"arch_instance": "res_elu"}  # whose layers are initialised from the first batch
MODEL = [word for name, value in {**TINY, **ELU}.items() for word in (f"--{name}", str(value))]
SHORT = ["--data", "digits", "--batch-size", "4", "--log-every", "2", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits) -> Path:
    """The folder of a run of two steps; tests only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer(folder, digits, TINY_TRAINING.replace(max_steps=2), **ELU).run()
    return folder


def train(*words: object) -> int:
    return cli.main(["train", *map(str, words)])


def failing(capsys, *words: object) -> str:
    """The error of a `train` that must fail with exit code 2."""
    capsys.readouterr()
    assert train(*words) == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------- --init-from


def test_every_weight_that_fits_is_taken_and_nothing_is_initialised_from_data(finished):
    source, _ = nf.training.load_model(finished)
    model = tiny_model(seed=5, **ELU)
    assert layers_needing_data_init(model)
    start = init_from(model, finished)
    assert (start.left, start.unused, start.step) == ((), (), 2)
    assert len(start.taken) == len(model.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert layers_needing_data_init(model) == []
    assert model.spectral.warm


def test_an_official_checkpoint_is_a_starting_point(finished, tmp_path):
    source, _ = nf.training.load_model(finished)
    nf.save_official(source, tmp_path / "official.pt")
    model = tiny_model(seed=5, **ELU)
    start = init_from(model, tmp_path / "official.pt")
    for name, value in source.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    # The vectors of the regulariser, which such files do not have, begin anew.
    assert start.left
    assert all(name.startswith("spectral.") for name in start.left)
    assert not model.spectral.warm
    assert layers_needing_data_init(model) == []


def test_what_does_not_fit_keeps_its_values_and_is_named(finished):
    source, _ = nf.training.load_model(finished)
    model = tiny_model(seed=5, num_latent_per_group=3, **ELU)  # other shapes
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = init_from(model, finished)
    theirs = source.state_dict()
    for name, value in model.state_dict().items():
        fits = name in start.taken
        same_shape = name in theirs and theirs[name].shape == value.shape
        assert fits == (same_shape and not name.startswith("spectral.")), name
        assert torch.equal(value, theirs[name] if fits else before[name]), name
    names = [text.split(" ")[0] for text in start.left]
    assert sorted([*names, *start.taken]) == sorted(before)
    lines = start.summary().splitlines()
    assert f"{len(start.taken)} of {len(before)} parameters and buffers taken" in lines[0]
    assert lines[1].startswith(f"{len(start.left)} initialised anew: ")
    shown = [text for text in start.left if text in lines[1]]
    assert shown == list(start.left[:10])
    assert any("there" in text for text in start.left)


def test_layers_that_were_not_loaded_are_initialised_by_the_first_batch(finished, digits):
    more = {"num_groups_per_scale": 3, **ELU}
    model = tiny_model(seed=5, **more)
    all_layers = layers_needing_data_init(tiny_model(**more))
    start = init_from(model, finished)
    waiting = layers_needing_data_init(model)
    assert waiting
    assert set(waiting) < set(all_layers)
    loaded = [name for name in all_layers if name not in waiting]
    assert all(f"{name}.weight" in start.taken for name in loaded)
    assert not any(f"{name}.weight" in start.taken for name in waiting)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        model.train()(digits.batch(range(4), 0), seed=0)
    assert layers_needing_data_init(model) == []
    for name in all_layers:
        changed = not torch.equal(
            model.get_parameter(f"{name}.log_weight_norm"), before[f"{name}.log_weight_norm"]
        )
        assert changed == (name in waiting), name


def test_layers_that_a_checkpoint_has_not_initialised_are_initialised(tmp_path, digits):
    begun = trainer(tmp_path / "begun", digits, **ELU)
    begun.save()
    model = tiny_model(seed=5, **ELU)
    init_from(model, tmp_path / "begun")
    assert layers_needing_data_init(model) == layers_needing_data_init(tiny_model(**ELU)) != []


def test_nothing_that_fits_is_an_error_and_changes_nothing(finished, tmp_path, capsys):
    options = {
        **TINY,
        "num_channels_enc": 6,
        "num_channels_dec": 6,
        "num_latent_per_group": 3,
        "use_se": False,
    }
    other = nf.NVAE(nf.NVAEConfig(**{**options, "dataset": "photos"}))
    document = {"model_config": other.config.to_dict(), "model": other.state_dict()}
    source = checkpoint.save(document, tmp_path, name="other.pt")
    model = tiny_model(**ELU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"init_from \(--init-from\): no parameter of .*other\.pt"):
        init_from(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert layers_needing_data_init(model)
    message = failing(capsys, *MODEL, *SHORT, "--init-from", source, "--out", tmp_path / "out")
    assert "--init-from" in message
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_read_is_named_with_the_option(tmp_path, capsys):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name in ("missing.pt", "junk.pt"):
        out = tmp_path / "out"
        message = failing(capsys, *MODEL, *SHORT, "--init-from", tmp_path / name, "--out", out)
        assert "--init-from" in message
        assert name in message
        assert not out.exists()


def test_a_run_from_a_checkpoint_starts_at_step_0_and_resumes(finished, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*MODEL, *SHORT, "--max-steps", 3, "--checkpoint-every", 2]
    assert train(*words, "--init-from", finished, "--out", out) == 0
    state = checkpoint.load(out)
    assert state["progress"]["step"] == 3
    assert all(entry["step"] == 3 for entry in state["optimizer"]["state"].values())
    first = checkpoint.load(out / checkpoint.PREVIOUS)
    assert first["progress"]["step"] == 2
    assert json.loads((out / "config.json").read_text())["init_from"] == str(finished)
    again = (
        tmp_path / "again"
    )  # the file of the run names its starting point, which the command line may take away
    assert train("--config", out, "--max-steps", 1, "--init-from", "none", "--out", again, "--quiet") == 0
    assert json.loads((again / "config.json").read_text())["init_from"] is None
    for option in ("--init-from", "--config"):
        message = failing(capsys, "--resume", "--out", out, option, finished)
        assert option in message
        assert "--resume" in message
    assert train("--resume", "--out", out, "--max-steps", 4, "--quiet") == 0
    assert json.loads((out / "config.json").read_text())["init_from"] == str(finished)


# ---------------------------------------------------------------------------- --config


def test_a_runs_own_config_gives_data_model_and_training_options(tmp_path):
    assert train(*MODEL, *SHORT, "--max-steps", 2, "--seed", 3, "--out", tmp_path / "a") == 0
    assert train("--config", tmp_path / "a", "--out", tmp_path / "b", "--quiet") == 0
    first, second = (checkpoint.load(tmp_path / name) for name in "ab")
    for key in ("model_config", "training_config", "data"):
        assert first[key] == second[key]
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def given(file: Path, *words: str) -> tuple[TrainingConfig, nf.NVAEConfig, str]:
    """The configurations of `train` with a file and these words."""
    import dataclasses

    from nvae_fast.cli import options
    from nvae_fast.cli.train import new_run

    arguments = cli.parse(["train", *words])
    found = config_file.read(str(file))
    found.fill_in(arguments)
    training = options.given(arguments, [field.name for field in dataclasses.fields(TrainingConfig)])
    model = options.given(arguments, options.MODEL_HELP)
    return new_run(arguments.preset, arguments.data, training, model, found)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(
        json.dumps(
            {
                "preset": "digits_demo",
                "model": {"num_channels_enc": 6},
                "training": {"batch_size": 9, "epochs": 2, "threads": None},
            }
        )
    )
    demo = nf.training.preset("digits_demo")
    training, model, data = given(file, "--batch-size", "7")
    expected = demo.training.replace(batch_size=7, epochs=2, max_steps=None, time_limit=None, threads=None)
    assert training == expected
    assert model == demo.model_config().replace(num_channels_enc=6)
    assert data == "digits"
    assert given(file, "--max-steps", "5")[0].total_steps(100) == 5
    whole = tmp_path / "config.json"  # of a run: every option is there
    whole.write_text(json.dumps({"data": {"source": "digits"}, "training": demo.training.to_dict()}))
    assert given(whole)[0] == demo.training
    assert given(whole, "--epochs", "3")[0].total_steps(100) == 300
    assert given(whole, "--epochs", "3")[0].time_limit is None


def test_data_of_a_file_are_read_as_it_says_unless_others_are_given(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"data": {"source": "faces", "kind": "lmdb", "crop": 100, "resample": None}}))
    arguments = cli.parse(["train"])
    config_file.read(str(file)).fill_in(arguments)
    assert (arguments.data, arguments.data_kind, arguments.crop, arguments.resample) == (
        "faces",
        "lmdb",
        100,
        None,
    )
    arguments = cli.parse(["train", "--data", "others"])
    config_file.read(str(file)).fill_in(arguments)
    assert (arguments.data, arguments.data_kind, arguments.crop) == ("others", None, None)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no tomllib")
def test_toml_has_the_same_tables(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'data = "digits"\n[model]\nnum_channels_enc = 6\n[training]\ntime_limit = "none"\nlearning_rate = 1e-3\n'
        'skip_grad_norm = 100\nautocast = "none"\n'
    )
    training, model, data = given(file)
    assert training == TrainingConfig(learning_rate=1e-3, skip_grad_norm=100, time_limit=None)
    assert model == nf.NVAEConfig(dataset="digits", num_channels_enc=6)
    assert data == "digits"


def test_toml_without_a_parser_says_what_to_install(tmp_path, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text("")
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ValueError, match=r"--config: .*run\.toml: .*pip install tomli"):
        config_file.read(str(file))


@pytest.mark.parametrize(
    "content, words",
    [
        (
            {"training": {"batchsize": 4}},
            ["unknown key 'batchsize' in [training]", "did you mean batch_size?"],
        ),
        ({"training": {"num_latent_scales": 4}}, ["'num_latent_scales' in [training]", "belongs in [model]"]),
        ({"batch_size": 4}, ["unknown key 'batch_size'", "belongs in [training]"]),
        ({"trainng": {}}, ["unknown key 'trainng'", "did you mean training?"]),
        ({"data": {"crp": 4}}, ["unknown key 'crp' in [data]", "did you mean crop?"]),
        ({"data": {"crop": "4"}}, ["crop in [data] must be int, got str"]),
        ({"data": 3}, ["data must be a table, got int"]),
        ({"model": []}, ["model must be a table, got list"]),
        ({"preset": "cifar"}, ["unknown preset 'cifar'", "did you mean cifar10?"]),
        ({"preset": 3}, ["preset must be a string, got int"]),
        ({"training": {"batch_size": 0}}, ["--batch-size must be at least 1, got 0", "(batch_size in "]),
        ({"training": {"seed": "a"}}, ["--seed must be int, got str", "(seed in "]),
        ({"model": {"num_x_bits": 9}}, ["--num-x-bits", "9", "(num_x_bits in "]),
        ([], ["expected a table of options, got list"]),
        ("{", ["run.json: "]),
    ],
)
def test_errors_name_file_and_key(content, words, tmp_path, capsys):
    file, out = tmp_path / "run.json", tmp_path / "out"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    data = [] if isinstance(content, dict) and "data" in content else ["--data", "digits"]
    message = failing(capsys, *data, "--config", file, "--out", out)
    for word in [*words, "run.json"]:
        assert word in message
    assert not out.exists()


def test_an_error_of_an_option_given_does_not_blame_the_file(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"training": {"batch_size": 4}}))
    message = failing(capsys, "--data", "digits", "--config", file, "--batch-size", "0")
    assert "--batch-size must be at least 1, got 0" in message
    assert "run.json" not in message


@pytest.mark.parametrize("name", ["missing.json", "options.yaml"])
def test_a_file_that_cannot_be_read_is_named(name, tmp_path, capsys):
    if name.endswith("yaml"):
        (tmp_path / name).write_text("a: 1")
    message = failing(capsys, "--data", "digits", "--config", tmp_path / name)
    assert "--config" in message
    assert name in message


# ---------------------------------------------------------------------------- --skip-grad-norm


def test_a_step_with_a_large_gradient_changes_nothing_and_is_counted(tmp_path, digits):
    config = TINY_TRAINING.replace(max_bad_steps=2)
    run = trainer(tmp_path / "free", digits, config)
    run.run()
    norms = [line["grad_norm"] for line in metrics.read_metrics(tmp_path / "free")]
    assert min(norms) > 1
    run = trainer(tmp_path / "none", digits, config.replace(skip_grad_norm=1e-3))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    result = run.run()  # more than max_bad_steps of them in a row
    assert (result.step, result.skipped, result.large) == (6, 0, 6)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    lines = metrics.read_metrics(tmp_path / "none")
    assert [line["large_steps"] for line in lines] == [2, 2, 2]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0]
    assert checkpoint.load(tmp_path / "none")["progress"]["large"] == 6


def test_a_bound_above_every_gradient_changes_no_number(tmp_path, digits):
    states = []
    for name, bound in (("a", None), ("b", 1e9)):
        run = trainer(tmp_path / name, digits, TINY_TRAINING.replace(skip_grad_norm=bound))
        assert run.run().large == 0
        states.append(run.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_large_steps_are_counted_across_a_resumed_run(tmp_path, digits):
    config = TINY_TRAINING.replace(skip_grad_norm=1e-3, max_steps=3)
    trainer(tmp_path / "run", digits, config).run()
    state = checkpoint.load_training(tmp_path / "run")
    result = trainer(tmp_path / "run", digits, config.replace(max_steps=5), state=state).run()
    assert result.large == 5


def test_large_steps_are_reported(tmp_path, capsys):
    words = [*MODEL, *SHORT[:-1], "--max-steps", 2, "--skip-grad-norm", "0.001", "--progress", "none"]
    assert train(*words, "--out", tmp_path / "run") == 0
    text = capsys.readouterr().err
    assert "step 0: gradient norm" in text
    assert "exceeds --skip-grad-norm 0.001" in text
    assert "2 step(s) skipped for their gradient norm" in text


# ---------------------------------------------------------------------------- --kl-const-coeff, --kl-max-coeff


def test_the_kl_coefficient_is_between_its_bounds():
    def coefficient(step: int, **bounds: float) -> float:
        return kl_coefficient(step, 1000, 0.4, 0.1, **bounds)

    bounds = {"const_coeff": 0.05, "max_coeff": 0.5}
    assert [coefficient(step, **bounds) for step in (0, 99, 500, 999)] == [0.05, 0.05, 0.5, 0.5]
    assert coefficient(300, **bounds) == pytest.approx(0.25)
    assert kl_coefficient(500, 1000, 0.0, 0.9, **bounds) == 0.05
    assert kl_coefficient(950, 1000, 0.0, 0.9, **bounds) == 0.5
    for step in range(0, 1000, 7):
        today = max(min((step - 100) / 400, 1.0), 1e-4)
        assert coefficient(step) == today
    for wrong in ({"const_coeff": 0.6, "max_coeff": 0.5}, {"max_coeff": 1.5}, {"const_coeff": -0.1}):
        with pytest.raises(ValueError, match="const_coeff"):
            coefficient(0, **wrong)


def test_a_run_has_the_kl_coefficients_it_is_given(tmp_path, digits):
    config = TINY_TRAINING.replace(
        kl_const_coeff=0.2, kl_max_coeff=0.4, kl_const_portion=0.5, kl_anneal_portion=0.25, log_every=1
    )
    trainer(tmp_path / "run", digits, config).run()
    values = [line["kl_coefficient"] for line in metrics.read_metrics(tmp_path / "run")]
    assert values == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.4 * 2 / 3, 0.4])


def test_kl_bounds_in_the_wrong_order_name_the_options(tmp_path, capsys):
    message = failing(capsys, *SHORT, "--kl-const-coeff", 0.5, "--kl-max-coeff", 0.4)
    assert "--kl-const-coeff (0.5) must not exceed --kl-max-coeff (0.4)" in message
