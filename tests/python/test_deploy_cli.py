"""`qtale deploy`: the report on stdout as text or JSON, changes logged on stderr, Ctrl-C ends the watch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plan_samples import LAYERS, save_importance, save_model
from qtale.checkpoint import fingerprint
from qtale.cli.main import main
from qtale.deployment.change import DeployReport, ModuleChange
from qtale.planner import LayerBits, Plan, PlannedModel
from qtale.report.deploy import render

RENDERED = """\
llama, 4 layers, of /models/llama, run by the engine
weights 2.0 KiB (as stored 4.0 KiB), 1.0 KiB for KV cache and workspace
budget 3.0 KiB (given)
16 → 8 bits: 1 module of layer 3
8 → 4 bits: 3 modules of layers 0-1 and lm_head
process 10.0 KiB → 8.0 KiB
1.2 s"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


def make_plan(fingerprint: str, bits: int) -> Plan:
    about = PlannedModel(fingerprint, "llama", LAYERS)
    return Plan(about, "uniform", "none", None, 0, 32, True, tuple(LayerBits(i, bits) for i in range(LAYERS)))


def test_the_report_as_text() -> None:
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head")
    changes = (*(ModuleChange(name, 8, 4, 800, 400) for name in names), ModuleChange("m.layers.3.a", 16, 8, 1600, 752))
    sizes = (3 << 10, "given", changes, 2 << 10, 4 << 10, 1 << 10, 10 << 10, 8 << 10, 1.23, "engine")
    report = DeployReport("/models/llama", make_plan("ab" * 32, 4), *sizes)
    assert render(report) == RENDERED
    assert report.bytes_freed == 2048
    assert str(report) == "3 from 8 to 4 bits, 1 from 16 to 8 bits; 2.0 KiB freed, weights take 2.0 KiB; 1.2 s"


def test_what_was_done_is_printed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", str(model), "--budget", "1GiB", "--context", "32"]) == 0
    shown = capsys.readouterr()
    assert f"llama, 4 layers, of {model}, run by the engine" in shown.out
    assert "no layer changed" in shown.out
    assert "budget: 1.0 GiB (given)" in shown.err
    assert main(["deploy", str(model), "--budget", "1GiB", "--threads", "1", "--kv-rule", "keep"]) == 0
    capsys.readouterr()
    assert main(["deploy", str(model), "--budget", "1GiB", "--threads", "2000"]) == 1
    assert "num_threads 2000 is not a number of threads" in capsys.readouterr().err
    assert main(["deploy", str(model), "--backend", "torch", "--threads", "2", "--kv-rule", "keep"]) == 1
    assert "num_threads, kv_rule: for the engine only" in capsys.readouterr().err
    scores = save_importance(tmp_path / "importance.json", model, {"jaccard": [0.1, 0.9, 0.7, 0.4]})
    arguments = ["--budget", "1200KiB", "--importance", str(scores), "--mode", "paper", "--json"]
    assert main(["deploy", str(model), *arguments]) == 1
    assert "the least budget that would do" in capsys.readouterr().err
    arguments[1] = "369.6MiB"
    assert main(["deploy", str(model), *arguments]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["plan"]["metric"] == "jaccard"
    assert value["plan"]["needed_bytes"] <= value["budget_bytes"]
    assert value["bytes_freed"] == value["stored_bytes"] - value["weights_bytes"] > 0


def test_a_plan_decides(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(fingerprint(model), 4).write(tmp_path / "plan.json")
    for backend, name in (("engine", "the engine"), ("torch", "PyTorch")):
        assert main(["deploy", str(model), "--plan", str(tmp_path / "plan.json"), "--backend", backend]) == 0
        shown = capsys.readouterr().out
        assert f"run by {name}\n" in shown
        assert "16 → 4 bits: 28 modules of layers 0-3" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "6"], "budget '6' is no size"),
        (["--interval", "3"], "--interval paces --watch"),
        (["--watch", "--interval", "0"], "--interval 0; it must be more than 0"),
        (["--plan", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--plan", "nowhere.json", "--mode", "paper"], "--plan says how bits are chosen"),
        (["--importance", "nowhere.json"], "nowhere.json"),
        (["--context", "-1"], "context -1"),
    ],
)
def test_mistakes_are_one_sentence(
    model: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", str(model), *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err


def test_ctrl_c_ends_the_watch_cleanly(model: Path) -> None:
    # Jobs that a shell starts in the background ignore Ctrl-C, and so would the process started here.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from qtale.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "deploy", str(model), "--watch", "--interval", "600", "--json"]
    environment = {**os.environ, "QTALE_MEMORY_BUDGET": "1GiB"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        lines = []
        for line in run.stderr:
            lines.append(line)
            if "watching the free memory" in line:
                run.send_signal(signal.SIGINT)
                break
        rest, printed = run.stderr.read(), run.stdout.read()
    assert run.returncode == 0, (lines, rest)
    assert "stopped watching" in rest
    assert "Traceback" not in rest
    assert json.loads(printed)["changes"] == []
