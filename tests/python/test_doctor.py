"""``qtale doctor``: what it reports, and that it reports where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from qtale import _core, doctor
from qtale.cli.main import main
from qtale.memory import host


def run_doctor(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qtale.doctor", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_the_report_says_what_is_here() -> None:
    found = doctor.report()
    assert found.packages["torch"] == version("torch")
    assert found.isa == _core.cpu_isa()
    assert found.isa in found.isas
    assert found.threads == _core.num_threads()
    assert found.cpus >= 1
    assert found.memory_total is None or found.memory_total > 1 << 28
    assert found.cuda or found.cuda_reason
    assert found.problems == ()
    text = found.text()
    assert f"{found.isa} in use" in text
    assert version("transformers") in text


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["isas"] == list(_core.cpu_isas())
    assert printed["packages"].keys() >= {"torch", "transformers", "lm-eval", "compressed-tensors", "numpy"}


def test_an_instruction_set_that_the_cpu_lacks_is_a_problem_not_a_crash() -> None:
    done = run_doctor("--json", QTALE_CPU_ISA="sparc")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["isa"] is None
    assert "'sparc' is not an instruction set" in found["problems"][0]
    assert found["environment"]["QTALE_CPU_ISA"] == "sparc"


@pytest.mark.parametrize("isa", _core.cpu_isas())
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    done = run_doctor("--json", QTALE_CPU_ISA=isa, QTALE_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["isa"], json.loads(done.stdout)["threads"]) == (isa, 1)


def test_missing_packages_are_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", (*doctor.REQUIRED, "qtale-no-such-package"))
    found = doctor.report()
    assert found.packages["qtale-no-such-package"] is None
    assert "pip install qtale-no-such-package" in found.problems[0]
    assert doctor.show(found, as_json=False) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_memory_limits_of_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "0::/user.slice/job\n",
        "/sys/fs/cgroup/user.slice/job/memory.max": "max\n",
        "/sys/fs/cgroup/user.slice/memory.max": "2147483648\n",
        "/sys/fs/cgroup/memory.max": "4294967296\n",
    }
    monkeypatch.setattr(host, "_read", lambda path: files.get(str(path), ""))
    assert doctor.report().memory_limit == 2 << 30
    files.clear()
    assert doctor.report().memory_limit is None
    files["/proc/self/cgroup"] = "4:memory:/\n"
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert doctor.report().memory_limit is None
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "1073741824\n"
    assert doctor.report().memory_limit == 1 << 30
