"""tests/gpu/smoke.py itself, on the CPU: every group is checked, and what fails is shown and counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SMOKE = Path(__file__).parent / "gpu" / "smoke.py"


def smoke(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SMOKE), "--device", "cpu", "--jobs", "1", "--out", str(out), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_an_operator_and_a_preset_pass(tmp_path: Path) -> None:
    done = smoke(tmp_path, "--only", "normal_sample", "mnist")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))
    names = [check["check"] for check in facts["checks"]]
    assert {"normal_sample", "mnist"} == {check["group"] for check in facts["checks"]}
    assert any("bfloat16 channels_last values" in name for name in names)
    assert any(name == "mnist bfloat16 training step, eager" for name in names)
    assert all(check["ok"] for check in facts["checks"])


def test_what_fails_is_shown_and_the_rest_still_runs(tmp_path: Path) -> None:
    done = smoke(tmp_path, "--only", "installation", "elu", NVAE_FAST_DISABLE_EXTENSION="1")
    assert done.returncode == 1
    assert "FAILED installation: AssertionError: extension: the C++ extension is disabled" in done.stdout
    assert "elu: 8 of 8 checks passed" in done.stdout


def test_a_process_that_dies_or_hangs_is_a_failure(tmp_path: Path) -> None:
    done = smoke(tmp_path, "--only", "elu", "--under", "sh -c 'kill -9 $$'")
    assert done.returncode == 1
    assert "FAILED elu: the process ended with exit status -9" in done.stdout
    done = smoke(tmp_path, "--only", "elu", "--under", "sh -c 'sleep 30'", "--seconds", "0.5")
    assert "FAILED elu: the process took more than 0.5 s" in done.stdout


def test_an_unknown_group_is_named(tmp_path: Path) -> None:
    done = smoke(tmp_path, "--group", "relu")
    assert done.returncode == 2
    assert "no such group: relu; there are: installation, mnist" in done.stderr
