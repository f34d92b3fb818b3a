"""`qtale report`: one page with every chart in it, refusals in sentences, and a look at it in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plan_samples import LAYERS, MODULES, save_importance, save_model
from qtale import InputError, UnsupportedError
from qtale.checkpoint import fingerprint
from qtale.cli.main import main
from qtale.importance import Importance
from qtale.planner import LayerBits, Plan, PlannedModel
from qtale.report import Quantization, Results, charts

SCORES = {"jaccard": [0.9, 0.4, 0.2, 0.6], "lim": [-0.1, -0.9, -0.95, -0.7]}
SETS = [[[1, 2, 3, 4], [3, 4, 5, 6], [3, 4, 5, 6], [5, 6, 7, 8], [60, 61, 62, 63]]]
HOSTILE = "<script>alert('x')</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def results_of(model: Path, **changes: Any) -> dict[str, Any]:
    row = {"average": 5.0, "group_size": 64, "bits": 5.1, "bytes": 1000, "seed": None}
    values = [("knapsack fisher", 30.0, None), ("uniform mix", 40.0, None), ("random", 38.0, 0), ("random", 42.0, 1)]
    rows = [{**row, "method": method, "perplexity": value, "seed": seed} for method, value, seed in values]
    settings = {"fingerprint": fingerprint(model), "windows": 2, "window_tokens": 64, "dtype": "float32"}
    return {"format": "qtale.results", "version": 1, "settings": settings, "rows": rows, **changes}


def quantized(model: Path, layers: int = LAYERS, **changes: Any) -> dict[str, Any]:
    """What ``qtale quantize --json`` prints, as far as the report reads it."""
    found = {"num_bits": 4, "error": None, "output_error": 1e-3, "rtn_output_error": 4e-3, "seconds": 0.5}
    inside = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(layers) for name in ("up", "down")]
    rows = [{**found, "name": name, **changes} for name in inside]
    head = {**found, "name": "lm_head", "error": 0.1, "output_error": None, "rtn_output_error": None, "seconds": None}
    sizes = {"bytes_before": 4096, "bytes_after": 1024, "bits_per_weight": 4.25}
    about = {"format": "qtale.quantization", "version": 1, "model": str(model), "dry_run": False}
    return {**about, **sizes, "layers": [*rows, head]}


def plan_of(model: Path) -> Plan:
    inside = [name.split(".", 3)[3] for name in MODULES[: len(MODULES) // LAYERS]]
    layers = [LayerBits(0, modules=dict.fromkeys(inside, 8)), *(LayerBits(number, 4) for number in range(1, LAYERS))]
    return Plan(
        PlannedModel(fingerprint(model), "llama", LAYERS), "knapsack", "jaccard", 2000, 1500, 64, True, (*layers,)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def files(model: Path) -> list[str]:
    folder = model.parent
    per_sequence = {"jaccard": [SCORES["jaccard"], [0.8, 0.5, 0.1, 0.7]]}
    words = {str(token): f"w{token}" for sets in SETS for row in sets for token in row} | {"3": HOSTILE}
    extra: dict[str, Any] = {"per_sequence": per_sequence, "token_sets": SETS, "words": words}
    save_importance(folder / "importance.json", model, SCORES, settings={"num_sequences": 2, "seq_len": 8}, **extra)
    plan_of(model).write(folder / "plan.json")
    (folder / "results.json").write_text(json.dumps(results_of(model)))
    return [str(folder / name) for name in ("results.json", "plan.json", "importance.json")]


@pytest.fixture(scope="module")
def written(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    folder = tmp_path_factory.mktemp("written")
    assert main(["report", *files, "-o", str(folder / "report.html"), "--png", str(folder / "charts")]) == 0
    return folder


def test_the_page_holds_every_chart_and_loads_nothing(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    images = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)">', page)
    assert len(images) == 4
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not re.search(r"https?://|<script|<link|url\(|@import", page)
    assert "&lt;script&gt;" in page
    assert "<td>40.00 ± 2.83</td>" in page
    assert {path.name for path in (written / "charts").iterdir()} == {
        *("importance.png", "overlap.png", "plan.png", "frontier.png")
    }
    assert [path for path in written.iterdir() if path.name.startswith(".")] == []


def test_importance_alone_makes_a_page(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    out = tmp_path / "report.html"
    assert main(["report", files[2], "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "png": None}
    page = out.read_text(encoding="utf-8")
    assert page.count("<img") == 2
    assert "<h2>Plan" not in page


def test_a_quantization_alone_makes_a_page(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    (tmp_path / "quantize.json").write_text(json.dumps(quantized(model)))
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "quantize.json"), "-o", str(out), "--png", str(tmp_path / "charts")]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("<img") == 1
    assert f"<h1>Layers of {model.name}</h1>" in page
    assert f"Solving took {LAYERS} seconds" in page
    assert "<td>4.000e-03</td><td>1.000e-03</td><td>25%</td><td>0.50</td>" in page
    assert "lm_head" not in page
    assert [path.name for path in (tmp_path / "charts").iterdir()] == ["errors.png"]


def test_a_quantization_beside_all_else(files: list[str], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    rounded = {"error": 0.1, "output_error": None, "rtn_output_error": None, "seconds": None}
    (tmp_path / "quantize.json").write_text(json.dumps(quantized(model, **rounded)))
    out = tmp_path / "report.html"
    assert main(["report", *files, str(tmp_path / "quantize.json"), "-o", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("<img") == 5
    assert "as a share of their norm" in page


def test_the_chart_of_errors_has_a_panel_for_each_module(model: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    found = Quantization.from_json(quantized(model))
    titles = [axes.get_title(loc="left") for axes in charts.error_chart(found).axes]
    assert titles == ["mlp.up_proj", "mlp.down_proj", "seconds"]
    first = charts.error_chart(found).axes[0]
    assert [line.get_ydata()[0] for line in first.lines] == [4e-3, 1e-3]
    assert found.seconds_by_layer() == [1.0] * LAYERS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "x"}, "is no output of `qtale quantize --json`"),
        ({"dry_run": True}, "is of a dry run"),
        ({"layers": []}, "has no matrix of a decoder layer"),
        ({"layers": {}}, "'layers' must be a list"),
        ({"layers": [{"name": "model.layers.0.up_proj", "num_bits": 4}]}, "has neither 'output_error' nor 'error'"),
        ({"layers": [{"name": "a.0.b", "num_bits": 4, "error": float("nan")}]}, "has error nan"),
        ({"layers": [3]}, "must be an object with a 'name'"),
    ],
)
def test_odd_quantizations_are_refused(model: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Quantization.from_json({**quantized(model), **changes})


def test_a_browser_shows_the_page(written: Path, tmp_path: Path) -> None:
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the screenshot")
    shot = tmp_path / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1000,1400", f"--screenshot={shot}", (written / "report.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    with image.open(shot) as opened:
        picture = opened.convert("RGB")
    assert picture.size == (1000, 1400)
    # Title and facts, the bars, and the heat map: each part of the page has ink of its own.
    for top, bottom in ((0, 160), (200, 550), (700, 1300)):
        colours = picture.crop((0, top, 1000, bottom)).getcolors(maxcolors=1 << 24)
        white = sum(count for count, colour in colours if min(colour) > 250)
        assert len(colours) > 20
        assert white < 0.99 * 1000 * (bottom - top)


def test_overlap_is_that_of_sets() -> None:
    overlap = charts.mean_overlap(SETS)
    assert overlap.shape == (5, 5)
    assert overlap[0, 1] == pytest.approx(2 / 6)
    assert overlap[1, 2] == overlap[3, 3] == 1
    assert overlap[0, 4] == 0


def test_points_join_seeds(model: Path) -> None:
    points = Results.from_json(results_of(model)).points(64)
    assert [point.method for point in points] == ["knapsack fisher", "uniform mix", "random"]
    assert (points[2].perplexity, points[2].spread) == (40.0, pytest.approx(8**0.5))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["report", *arguments]) == 1
    return capsys.readouterr().err


def test_refusals_are_sentences(
    files: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("-o", str(tmp_path / "report.html"))
    assert "no importance.json is given" in refused(capsys, files[1], *out)
    assert "is a second importance" in refused(capsys, files[2], files[2], *out)
    assert "is no file" in refused(capsys, str(tmp_path / "none.json"), *out)
    (tmp_path / "other.json").write_text('{"format": "other"}')
    assert "has the format 'other'" in refused(capsys, str(tmp_path / "other.json"), *out)
    assert "exists already" in refused(capsys, files[2], "-o", files[2])
    other = save_model(tmp_path / "other", seed=8)
    plan_of(other).write(tmp_path / "plan.json")
    assert "the plan is for another model" in refused(capsys, files[2], str(tmp_path / "plan.json"), *out)
    (tmp_path / "quantize.json").write_text(json.dumps(quantized(model, LAYERS + 1)))
    assert "the quantization is of another model" in refused(capsys, files[2], str(tmp_path / "quantize.json"), *out)
    (tmp_path / "results.json").write_text(json.dumps(results_of(other)))
    assert "the results are of another model" in refused(capsys, files[2], str(tmp_path / "results.json"), *out)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "x"}, "is no result"),
        ({"rows": []}, "at least one result"),
        ({"rows": [{"method": "a"}]}, "has average None"),
        ({"rows": [{"method": ""}]}, "with a 'method'"),
        ({"settings": []}, "'settings' must be a JSON object"),
    ],
)
def test_odd_results_are_refused(model: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Results.from_json(results_of(model, **changes))


def test_without_matplotlib_there_is_a_sentence(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install qtale\[viz\]"):
        charts.importance_bars(Importance.read(files[2]))
