"""`qtale plan`: the plan on stdout as bars or JSON, the file beside it, sentences on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plan_samples import save_importance, save_model
from qtale.cli.main import main
from qtale.planner import LayerBits, Plan, PlannedModel

FIXTURE = str(Path(__file__).parent / "fixtures" / "llama-2-7b.json")
SHOWN = """\
llama, 4 layers, fingerprint abababababababababa: mode knapsack, scores by fisher, groups of 64, symmetric
needs 1.5 KiB (1500 B) of a budget of 2.0 KiB (2000 B)

0  ████████████████                  8
1  ████████████▋                     6.3: q,k,v 4, o 16, gate,up 4, down 8
2  ████████████████████████████████  16
3  ██████                            3

head 8 bits; 1 layer 16 bits, 1 layer 3 bits, 1 layer 8 bits, 1 layer mixed
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


def test_show_prints_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
    mixed = dict(zip(inside, (4, 4, 4, 16, 4, 4, 8), strict=True))
    layers = (LayerBits(0, 8), LayerBits(1, modules=mixed), LayerBits(2, 16), LayerBits(3, 3))
    plan = Plan(PlannedModel("ab" * 32, "llama", 4), "knapsack", "fisher", 2000, 1500, 64, True, layers, 8)
    plan.write(tmp_path / "plan.json")
    assert main(["plan", "--show", str(tmp_path / "plan.json")]) == 0
    assert capsys.readouterr().out == SHOWN
    assert main(["plan", "--show", str(tmp_path / "plan.json"), "--json"]) == 0
    assert Plan.from_json(json.loads(capsys.readouterr().out)) == plan


def test_a_plan_is_made_written_and_replayed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"jaccard": [0.1, 0.9, 0.8, 0.2], "lim": [-0.1, -0.9, -0.8, -0.2]}
    source = str(save_importance(tmp_path / "importance.json", model, scores))
    file = tmp_path / "plan.json"
    command = ["plan", source, "--bits", "6", "--mode", "paper", "--metric", "lim", "-o", str(file)]
    assert main([*command, "--json"]) == 0
    printed = Plan.from_json(json.loads(capsys.readouterr().out))
    assert Plan.read(file) == printed
    assert [layer.num_bits for layer in printed.layers] == [8, 4, 4, 8]
    assert (printed.metric, printed.group_size) == ("lim", "channel")
    assert main(command) == 1
    assert "plan.json: exists already" in capsys.readouterr().err
    assert main(["quantize", str(model), "--plan", str(file), "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out


def test_budgets_come_from_the_command_and_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", FIXTURE, "--mode", "paper", "--budget", "6GiB", "--reserve", "350MiB"]) == 0
    shown = capsys.readouterr()
    assert "10 layers 4 bits, 22 layers 8 bits" in shown.out
    assert "of a budget of 6.0 GiB" in shown.out
    assert "all layers count the same" in shown.err
    monkeypatch.setenv("QTALE_MEMORY_BUDGET", "16GiB")
    assert main(["plan", FIXTURE, "--solver", "uniform", "--group-size", "64", "--context", "16"]) == 0
    shown = capsys.readouterr()
    assert "32 layers 16 bits" in shown.out
    assert "budget: 16.0 GiB (QTALE_MEMORY_BUDGET)" in shown.err
    monkeypatch.setenv("QTALE_MEMORY_BUDGET", "plenty")
    assert main(["plan", FIXTURE, "--mode", "uniform"]) == 1
    assert "QTALE_MEMORY_BUDGET 'plenty' is no size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give importance.json or a model to plan for"),
        ([FIXTURE, "--show", "plan.json"], "--show prints a plan that is there"),
        ([FIXTURE, "--mode", "paper", "--budget", "6"], "budget '6' is no size; write a number and a unit of B, KiB"),
        ([FIXTURE, "--mode", "paper", "--budget", "3GiB"], "do not hold this model; the least budget that would do"),
        ([FIXTURE, "--mode", "paper", "--budget", "9GiB", "--reserve", "x"], "--reserve 'x' is no size"),
        ([FIXTURE, "--mode", "paper", "--budget", "9GiB", "--head-bits", "eight"], "head bits 'eight'"),
        ([FIXTURE, "--mode", "paper", "--budget", "9GiB", "--timeout", "5"], "--timeout limits --wait"),
        ([FIXTURE, "--mode", "paper", "--budget", "9GiB", "--wait"], "waiting follows the free memory"),
        ([FIXTURE, "--mode", "paper", "--bits", "6", "--wait"], "exclude each other"),
        (["/nowhere/model", "--bits", "6"], "there is no such folder"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err


@pytest.mark.parametrize(
    "arguments", [["--budget", "1GiB", "--bits", "4"], ["--choices", "8,four"], ["--mode", "best"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", FIXTURE, *arguments])
    assert caught.value.code == 2
