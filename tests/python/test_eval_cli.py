"""``qtale eval`` end to end on a tiny model: options, tables, files, errors."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import transformers
from lm_eval.models.huggingface import HFLM

from eval_samples import byte_tokenizer, write_documents, write_model
from qtale.cli import eval as cli
from qtale.errors import CheckpointError, Error, InputError
from qtale.eval import EvalOptions, evaluate
from qtale.eval.sources import Source
from qtale.eval.tasks import opened_tasks
from qtale.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "data")


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(list(words))


def _options(*words: str) -> EvalOptions:
    return cli.options_of(_arguments("--tasks", "arc_e", *words))


def _run(*words: str) -> int:
    return cli.run(_arguments(*words))


def test_without_a_model_it_is_the_demo_at_4_bits() -> None:
    found = _options()
    assert (found.model, found.spec, found.method) == ("demo", QuantSpec(4, "auto", True), "auto")
    assert _options("--bits", "4").method == _options("--dense").method == "rtn"


def test_a_calibrated_method_scores_the_folder_that_it_keeps(
    model: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qtale
    from qtale.integrations import calibration
    from qtale.integrations.quantized_cache import quantized_folder

    text = ["one two three four five six seven\n\n" * 400]
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_: tmp_path)
    monkeypatch.setattr(calibration, "_bundled", lambda: text)
    options = qtale.SolverOptions("gptq", num_samples=4, seq_len=16)
    first = quantized_folder(model, QuantSpec(3, 32), options, progress=False)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert quantized_folder(model, QuantSpec(3, 32), options, progress=False) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert quantized_folder(model, QuantSpec(4, 32), options, progress=False) != first
    assert first.parent == tmp_path
    assert not list(tmp_path.glob(".*.state"))
    settings = {"spec": QuantSpec(3, 32), "method": "gptq", "baseline": "", "data": str(documents)}
    monkeypatch.setattr("qtale.eval.run._NUM_SAMPLES", 2)
    outcome = evaluate(EvalOptions(("arc_easy",), str(model), **settings))
    assert 3 < outcome.results["qtale"]["bits_per_weight_quantized"] < 16
    assert outcome.results["qtale"]["baseline"]["bits_per_weight_quantized"] is None
    named = outcome.results["config"]["model_args"]
    assert (named["pretrained"], named["method"], named["num_bits"]) == (str(model), "gptq", 3)
    with pytest.raises(InputError, match="--method gptq: says how to quantize"):
        _options("--model", str(model), "--method", "gptq")
    assert _options("--dense").spec is None
    assert _options("--bits", "8", "--group-size", "channel").spec == QuantSpec(8, "channel", True)
    assert _options("--model", "some/where").spec is None
    assert _options("--model", "m", "--bits", "3", "--group_size", "64", "--asymmetric").spec == QuantSpec(3, 64, False)
    assert _options("--seed", "7").seed == (7, 7, 7, 7)
    assert _options("--limit", "40").windows == 40
    assert _options("--limit", "0.5").windows is None
    assert _options("--limit", "40", "--perplexity_windows", "2").windows == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dense", "--bits", "4"], "--dense: scores the model as stored"),
        (["--model", "m", "--group-size", "64"], "need --bits"),
        (["--bits", "5"], "num_bits 5 is not supported"),
        (["--group-size", "48"], "group_size 48 is not supported"),
        (["--limit", "0"], "--limit must be a number above 0"),
        (["--batch_size", "many"], "--batch_size must be a number above 0"),
        (["--num_fewshot", "-1"], "--num_fewshot -1: must be 0 or more"),
        (["--log_samples"], "needs --output_path"),
    ],
)
def test_options_that_mean_nothing_are_sentences(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _options(*words)


def test_results_are_the_harness_s_own(model: Path, documents: Path) -> None:
    outcome = evaluate(EvalOptions(("arc_easy", "piqa"), str(model), data=str(documents)))
    plain = HFLM(pretrained=str(model), dtype="float32", device="cpu", tokenizer=byte_tokenizer())
    with opened_tasks(["arc_easy", "piqa"], Source("folder", documents)) as (manager, names):
        expected = lm_eval.simple_evaluate(plain, tasks=names, task_manager=manager)
    assert outcome.results["results"] == expected["results"]
    assert outcome.results["versions"] == expected["versions"]
    assert set(outcome.results) - set(expected) == {"qtale"}


def test_the_table_and_what_the_model_costs(model: Path, documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--model", str(model), "--tasks", "arc_e,wikitext", "--data", str(documents), "--limit", "2") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"qtale (pretrained={model}")
    assert "|arc_easy|" in out
    assert "|wikitext|" in out
    assert "WikiText-2 perplexity, 2 of" in out
    assert "16.00 bits per weight" in out


def test_json_is_one_object_on_stdout(
    model: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model), "--bits", "4", "--group-size", "32", "--baseline", "--data", str(documents)]
    assert (
        _run(*words, "--tasks", "piqa,arc_e", "--json", "-o", str(tmp_path), "--log_samples", "--num_fewshot", "0") == 0
    )
    printed = json.loads(capsys.readouterr().out)
    (file,) = tmp_path.rglob("results_*.json")
    written = json.loads(file.read_text())
    facts = printed["qtale"]
    assert facts == written["qtale"]
    assert printed["results"] == written["results"]
    assert facts["quantized_in_memory"] == {"num_bits": 4, "group_size": 32, "symmetric": True}
    assert facts["bits_per_weight_quantized"] > 4.5
    assert facts["baseline"]["bits_per_weight_quantized"] is None
    assert facts["baseline"]["bytes"] > facts["bytes"]
    assert facts["requests"] == 16
    assert facts["tokens_per_second"] > 0
    assert facts["peak_memory_bytes"] > 1 << 20
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 2


def test_baseline_gives_two_columns(model: Path, documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        str(model),
        "--bits",
        "2",
        "--group-size",
        "32",
        "--data",
        str(documents),
        "--tasks",
        "arc_c,siqa",
    ]
    assert _run(*words, "--baseline") == 0
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, rows = [cell.strip() for cell in table[0]], table[2:]
    value, dense, difference = (header.index(name) for name in ("Value", "Dense", "Difference"))
    assert len(rows) == 3
    for row in rows:
        assert float(row[value]) - float(row[dense]) == pytest.approx(float(row[difference]), abs=1e-4)


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
def test_quantizing_in_memory_equals_the_folder_that_quantize_writes(
    compute: str, model: Path, documents: Path, tmp_path: Path
) -> None:
    import qtale

    spec = QuantSpec(4, 32)
    qtale.quantize(model, tmp_path / "quantized", spec, progress=False)
    common: dict[str, Any] = {"data": str(documents), "compute": compute, "log_samples": True, "output_path": tmp_path}
    memory = evaluate(EvalOptions(("arc_easy",), str(model), spec, **common))
    folder = evaluate(EvalOptions(("arc_easy",), str(tmp_path / "quantized"), **common))
    for one, other in zip(memory.samples["arc_easy"], folder.samples["arc_easy"], strict=True):
        assert one["resps"] == other["resps"]
    sizes = ("bytes", "parameters", "bits_per_weight", "bits_per_weight_quantized")
    assert [memory.results["qtale"][key] for key in sizes] == [folder.results["qtale"][key] for key in sizes]


def test_quantized_folders_need_the_name_of_their_baseline(model: Path, documents: Path, tmp_path: Path) -> None:
    import qtale

    quantized = str(tmp_path / "quantized")
    qtale.quantize(model, quantized, QuantSpec(8, "channel"), progress=False)
    common: dict[str, Any] = {"data": str(documents)}
    with pytest.raises(InputError, match="name its dense original"):
        evaluate(EvalOptions(("arc_easy",), quantized, baseline="", **common))
    with pytest.raises(InputError, match="is quantized; name a dense model"):
        evaluate(EvalOptions(("arc_easy",), quantized, baseline=quantized, **common))
    with pytest.raises(InputError, match="is quantized already"):
        evaluate(EvalOptions(("arc_easy",), quantized, QuantSpec(4), **common))
    with pytest.raises(InputError, match="add --bits to compare with"):
        evaluate(EvalOptions(("arc_easy",), str(model), baseline="", **common))
    outcome = evaluate(EvalOptions(("arc_easy",), quantized, baseline=str(model), **common))
    assert outcome.results["qtale"]["baseline"]["model"] == str(model)


def test_mistakes_are_found_before_the_model_is_loaded(model: Path, documents: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task 'arc_eazy'; near: arc_easy"):
        evaluate(EvalOptions(("arc_eazy",), "/no/such/model", data=str(documents)))
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate(EvalOptions(("arc_easy",), "/no/such/model", data=str(documents)))
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="could not be written"):
        evaluate(EvalOptions(("arc_easy",), str(model), data=str(documents), output_path=tmp_path / "file" / "below"))


def test_tasks_of_a_chat_model_with_a_template(documents: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    common: dict[str, Any] = {"data": str(documents), "log_samples": True, "output_path": tmp_path / "out"}
    outcome = evaluate(EvalOptions(("piqa",), str(folder), apply_chat_template=True, **common))
    assert outcome.samples["piqa"][0]["arguments"]["gen_args_0"]["arg_0"].startswith("<user>Question:")


def test_the_module_runs_and_names_errors_on_stderr(documents: Path) -> None:
    words = ["--tasks", "arc_eazy", "--data", str(documents)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qtale.eval", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("qtale: error: --tasks: there is no task 'arc_eazy'; near: arc_easy")
