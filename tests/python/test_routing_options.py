"""Thresholds, depths and the KV cache's options: what each command does with them and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtale
from eval_samples import write_documents, write_model
from qtale.cli.main import main
from qtale.errors import InputError
from qtale.integrations.routing import router_weights
from qtale.nn import Router
from qtale.routing import Routing, parse_layers, write_routing

LAYERS, HIDDEN = 4, 64
PROMPT = "The sky is blue because"
FOR_ENGINE = "--kv-dtype, --kv-rule, --theta, --depth, --lm-head-bits, --threads: are options of the engine, but"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=LAYERS, hidden_size=HIDDEN)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("routed") / "model", num_hidden_layers=LAYERS, hidden_size=HIDDEN)
    torch.manual_seed(1)
    routers = {layer: Router(HIDDEN, 6) for layer in (1, 2)}
    with torch.no_grad():
        for router in routers.values():
            router.last.weight.mul_(8)
            router.last.bias.zero_()
    weights = {layer: router_weights(router) for layer, router in routers.items()}
    write_routing(folder, Routing(weights, 0.5, 1, "evict"), LAYERS, HIDDEN)
    return folder


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data")


def generated(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    words = ["generate", str(folder), PROMPT, "--max-new-tokens", "12", "--compute", "float", "--json", *options]
    assert main(words) == 0
    return str(json.loads(capsys.readouterr().out)["text"])


def refused(capsys: pytest.CaptureFixture[str], verb: str, folder: Path, *options: str) -> str:
    words = {"generate": [PROMPT], "chat": [], "bench": ["--repeat", "1"]}[verb]
    assert main([verb, str(folder), *words, *options]) == 1
    err = capsys.readouterr().err
    assert err.count("qtale: error: ") == 1
    return err


@pytest.mark.parametrize(
    ("words", "load", "theta", "depth"),
    [
        (["--theta", "0.9"], {}, 0.9, None),
        (["--theta", "0.9", "--kv-rule", "keep"], {"kv_rule": "keep"}, 0.9, None),
        (["--theta", "0"], {}, 0.0, None),
        (["--depth", "0,2-3"], {}, None, [0, 2, 3]),
        (["--depth", "0,3", "--kv-rule", "keep", "--kv-dtype", "float32"], {"kv_rule": "keep", "kv_dtype": "float32"},
         None, [0, 3]),
    ],
)  # fmt: skip
def test_generate_runs_as_the_engine_does_when_told_so(
    routed: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    load: dict[str, Any],
    theta: float | None,
    depth: list[int] | None,
) -> None:
    with qtale.load(routed, compute="float", progress=False, **load) as engine:
        plain = str(engine.generate(PROMPT, 12))
        if theta is not None:
            engine.theta = theta
        engine.set_depth(depth)
        expected = str(engine.generate(PROMPT, 12))
    assert generated(capsys, routed, *words) == expected != plain


@pytest.mark.parametrize("verb", ["generate", "chat", "bench"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--theta", "1.5"], "theta 1.5 is not accepted; it is a probability"),
        (["--theta", "0.5", "--depth", "0"], "with a depth no router decides, so theta has no effect"),
        (["--depth", "0-9"], "there is no layer 4; they are 0 to 3"),
        (["--depth", "0-"], "--depth '0-': '0-' is no layer and no range of layers"),
        (["--kv-dtype", "float8"], "kv_dtype 'float8' is not known; use auto, float16"),
        (["--kv-rule", "drop"], "--kv-rule 'drop' is not known; use evict or keep"),
    ],
)
def test_wrong_values_are_refused(
    routed: Path, capsys: pytest.CaptureFixture[str], verb: str, words: list[str], message: str
) -> None:
    (routed / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert message in refused(capsys, verb, routed, *words)


@pytest.mark.parametrize("verb", ["generate", "chat", "bench"])
def test_a_model_without_routers_refuses_what_it_has_no_use_for(
    dense: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert "--theta 0.5: " in (found := refused(capsys, verb, dense, "--theta", "0.5"))
    assert "has no routers" in found
    assert "--kv-rule keep: no token of " in refused(capsys, verb, dense, "--kv-rule", "keep")


def test_a_model_without_routers_takes_a_depth(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with qtale.load(dense, compute="float", kv_rule="keep", progress=False) as engine:
        assert engine.routed_layers == ()
        engine.set_depth([0, 2])
        expected = str(engine.generate(PROMPT, 12))
    assert generated(capsys, dense, "--depth", "0,2", "--kv-rule", "keep") == expected


def test_bench_measures_the_layers_that_run(routed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(routed), "--threads", "1", "--batch", "1", "--prompt", "8", "--repeat", "1", "--json"]
    read = []
    for options in ([], ["--depth", "0,3"], ["--theta", "0.9", "--kv-rule", "keep", "--kv-dtype", "float32"]):
        assert main([*words, *options]) == 0
        weights = json.loads(capsys.readouterr().out)["weights"]
        read.append(weights["token_bytes"] - weights["head_bytes"])
    assert read[0] == read[2] == 2 * read[1]


def evaluated(capsys: pytest.CaptureFixture[str], folder: Path, documents: Path, *options: str) -> dict[str, Any]:
    words = ["eval", "--model", str(folder), "--tasks", "wikitext", "--data", str(documents), "--limit", "1", "--json"]
    assert main([*words, "--perplexity_windows", "1", *options]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)["qtale"]
    return facts


def test_eval_scores_under_them(routed: Path, documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (documents / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    stored = evaluated(capsys, routed, documents)
    assert stored["routing"] == {"theta": None, "layers": None, "kv_rule": None}
    found = evaluated(capsys, routed, documents, "--theta", "0.9", "--kv-rule", "keep")
    assert found["routing"] == {"theta": 0.9, "layers": None, "kv_rule": "keep"}
    with qtale.load(routed, compute="int16", kv_dtype="float32", kv_rule="keep", progress=False) as engine:
        engine.theta = 0.9
        ids = engine.tokenizer.encode(text, add_special_tokens=False)[: engine.context]
        assert found["wikitext"]["perplexity"] == pytest.approx(engine.perplexity(ids), rel=1e-6)
    found = evaluated(capsys, routed, documents, "--depth", "0,3", "--kv-dtype", "float16")
    assert found["routing"] == {"theta": None, "layers": [0, 3], "kv_rule": None}
    assert (found["kv_dtype"], stored["kv_dtype"]) == ("float16", None)
    with qtale.load(routed, compute="int16", kv_dtype="float16", progress=False) as engine:
        engine.set_depth([0, 3])
        assert found["wikitext"]["perplexity"] == pytest.approx(engine.perplexity(ids), rel=1e-6)
    assert found["wikitext"]["perplexity"] != stored["wikitext"]["perplexity"]


def test_the_baseline_of_eval_runs_as_it_is_stored(
    routed: Path, documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = evaluated(capsys, routed, documents)["wikitext"]["perplexity"]
    found = evaluated(capsys, routed, documents, "--bits", "8", "--group-size", "32", "--baseline", "--depth", "0,3")
    assert found["baseline"]["wikitext"]["perplexity"] == stored
    assert found["baseline"]["routing"] == {"theta": None, "layers": None, "kv_rule": None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--theta", "0.9"], "has no routers for it"),
        (["--depth", "0-99"], "there is no layer 4; they are 0 to 3"),
        (["--kv-rule", "drop"], "'drop' is not known; use evict or keep"),
        (["--backend", "torch", "--depth", "0"], FOR_ENGINE),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_loaded(
    dense: Path,
    documents: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(qtale, "load", load)
    given = ["--model", str(dense), "--tasks", "arc_easy", "--data", str(documents), "--bits", "8", "--baseline"]
    assert main(["eval", *given, *words]) == 1
    assert message in capsys.readouterr().err
    if "--backend" not in words:
        assert main(["generate", str(dense), PROMPT, *words]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "torch", "--theta", "0.9"], FOR_ENGINE),
        (["--backend", "torch", "--theta", "0"], FOR_ENGINE),
        (["--backend", "torch", "--depth", "0"], FOR_ENGINE),
        (["--backend", "torch", "--kv-rule", "keep"], FOR_ENGINE),
        (["--dtype", "bfloat16", "--kv-dtype", "float16"], FOR_ENGINE),
        (["--dtype", "bfloat16", "--threads", "1"], FOR_ENGINE),
        (["--depth", "0-9"], "there is no layer 4; they are 0 to 3"),
        (["--kv-dtype", "float8"], "kv_dtype 'float8' is not known"),
    ],
)
def test_eval_refuses_what_it_cannot_do(
    routed: Path, documents: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    tasks = ["--tasks", "arc_e", "--data", str(documents), "--limit", "1"]
    assert main(["eval", "--model", str(routed), *tasks, *words]) == 1
    assert message in capsys.readouterr().err


def test_layers_are_numbers_and_ranges() -> None:
    assert parse_layers("0-2, 5,14 - 15,5") == (0, 1, 2, 5, 14, 15)
    for wrong in ("", "a", "3-1", "1,,2", "-1", "1-2-3", "0.5", "0-99999999999"):
        with pytest.raises(InputError, match=f"--depth '{wrong}': .* use numbers and ranges"):
            parse_layers(wrong)


def test_an_engine_names_what_is_no_depth_and_no_theta(routed: Path) -> None:
    with qtale.load(routed, progress=False) as engine:
        assert engine.routed_layers == (1, 2)
        before = engine.logits([5, 6, 7])
        depths: dict[Any, str] = {
            (0.5,): "set_depth: layer 0.5 is no integer; give numbers from 0 to 3",
            (True,): "layer True is no integer",
            "0-3": "layer '0' is no integer",
            5: "set_depth: 5 is no list of layers; give their numbers, or None for all",
            (-1,): "there is no layer -1; they are 0 to 3",
        }
        for layers, message in depths.items():
            with pytest.raises(InputError, match=message):
                engine.set_depth(layers)
        for theta in ("x", None, True, float("nan"), -0.1, 1.5):
            with pytest.raises(InputError, match=f"theta {theta!r} is not accepted; it is a probability"):
                engine.theta = theta  # type: ignore[assignment]
        assert engine.theta == 0.5
        assert np.array_equal(engine.logits([5, 6, 7]), before)
        engine.theta = np.float32(0.25)  # type: ignore[assignment]
        assert engine.theta == 0.25
        engine.set_depth(np.array([0, 3]))  # type: ignore[arg-type]
        engine.logits([5, 6, 7])
        assert engine.report.executed == [3, 0, 0, 3]
