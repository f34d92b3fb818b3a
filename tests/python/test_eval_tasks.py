"""Local documents give the harness's own prompts; names and mistakes are answered with sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from eval_samples import ARTICLES, DOCUMENTS, write_documents, write_rows
from qtale.errors import InputError
from qtale.eval import local
from qtale.eval.catalog import ALIASES, MMLU, TASKS, WIKITEXT, LocalTask
from qtale.eval.sources import Source, choose, why_no_hub
from qtale.eval.tasks import harness_tasks, mmlu_subjects, opened_tasks, task_names

CHOICE_TASKS = [task for task in TASKS.values() if task.name != WIKITEXT]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("eval") / "data")


def _source(folder: Path) -> Source:
    return Source("folder", folder)


def _ours(task: LocalTask, folder: Path, num_fewshot: int = 0) -> ConfigurableTask:
    with opened_tasks([task.name], _source(folder), num_fewshot) as (manager, names):
        return manager.load(names)["tasks"][task.name]


def _harness(task: LocalTask, rows: dict[str, list[dict[str, Any]]]) -> ConfigurableTask:
    """The harness's own task with documents handed over as the hub would give them."""
    config = load_yaml(harness_tasks() / task.yaml)
    splits = {split: datasets.Dataset.from_list(own) for split, own in rows.items()}
    for key, split in (("training_split", "train"), ("validation_split", "validation"), ("test_split", "test")):
        config[key] = split if split in rows else None
    if "dev" not in rows:
        config["fewshot_split"] = None
    config.pop("tag", None)
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})


def _as_published(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A document as the hub's copy has it, where that differs from the local form."""
    if task == "boolq":
        return {**row, "label": int(row["answer"])}
    if task == "hellaswag":
        label, _, text = row["query"].partition(": ")
        first, _, second = text.rpartition(" ")
        return {**row, "activity_label": label, "ctx_a": first, "ctx_b": second.lower(), "label": str(row["label"])}
    return row


def _prompts(task: ConfigurableTask, count: int, num_fewshot: int = 0) -> list[Any]:
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=count, rank=0, world_size=1)
    targets = [task.doc_to_target(doc) for doc in task.eval_docs.select(range(min(count, len(task.eval_docs))))]
    return [[instance.args for instance in task.instances], targets]


@pytest.mark.parametrize("task", CHOICE_TASKS, ids=lambda task: task.name)
def test_prompts_are_those_of_the_harness(task: LocalTask, documents: Path) -> None:
    rows = [_as_published(task.name, row) for row in DOCUMENTS[task.name]]
    ours, theirs = _ours(task, documents), _harness(task, {task.scored: rows})
    assert _prompts(ours, 10) == _prompts(theirs, 10)
    assert ours.VERSION == theirs.VERSION
    assert list(ours.aggregation()) == list(theirs.aggregation())


# The real HellaSwag file holds cleaned queries only, so there is nothing published to compare with.
@pytest.mark.parametrize(
    "task", [task for task in CHOICE_TASKS if task.name != "hellaswag"], ids=lambda task: task.name
)
def test_prompts_of_real_documents_are_those_of_the_harness(task: LocalTask, qtale_data: Path) -> None:
    folder = qtale_data / "data"
    rows = [json.loads(line) for line in (folder / task.file(task.scored)).read_text("utf-8").split("\n") if line]
    theirs = _harness(task, {task.scored: [_as_published(task.name, row) for row in rows]})
    assert _prompts(_ours(task, folder), 200) == _prompts(theirs, 200)


def test_hellaswag_may_be_as_published(documents: Path, tmp_path: Path) -> None:
    task = TASKS["hellaswag"]
    write_rows(tmp_path / task.file("validation"), [_as_published(task.name, row) for row in DOCUMENTS[task.name]])
    assert _prompts(_ours(task, tmp_path), 5) == _prompts(_ours(task, documents), 5)


def test_few_shot_prompts_are_those_of_the_harness(documents: Path, tmp_path: Path) -> None:
    task, rows = TASKS["arc_easy"], DOCUMENTS["arc_easy"]
    train = [{**row, "id": f"t{index}", "question": f"{row['question']} {index}"} for index, row in enumerate(rows * 4)]
    write_rows(tmp_path / "arc_easy" / "train.jsonl", train)
    write_rows(tmp_path / "arc_easy" / "test.jsonl", rows)
    theirs = _harness(task, {"train": train, "test": rows})
    prompts = _prompts(_ours(task, tmp_path, 3), 10, 3)
    assert prompts == _prompts(theirs, 10, 3)
    assert prompts[0][0][0].count("Question:") == 4
    with pytest.raises(InputError, match=r"arc_easy: 3 examples .* train split, .*train\.jsonl"):
        _ours(task, documents, 3)


@pytest.mark.parametrize("task", [*TASKS.values(), mmlu_subjects()[0]], ids=lambda task: task.name)
def test_the_catalog_says_what_the_harness_says(task: LocalTask) -> None:
    config = load_yaml(harness_tasks() / task.yaml, resolve_func=False)
    assert config["task"] == task.name
    assert task.scored == (config.get("test_split") or config["validation_split"])
    assert task.shots == (config.get("fewshot_split") or config.get("training_split"))
    assert set(ALIASES.values()) <= set(TASKS)


def test_wikitext_is_split_into_articles(documents: Path, qtale_data: Path) -> None:
    assert [page.split("\n")[0] for page in local.articles(ARTICLES)] == [" = First = ", " = Second = "]
    assert "".join(local.articles(ARTICLES)).count("= = Part = =") == 1
    assert len(_ours(TASKS[WIKITEXT], documents).eval_docs) == 32
    # The number of documents that the document-level set on the hub has.
    assert len(_ours(TASKS[WIKITEXT], qtale_data / "data").eval_docs) == 62


def test_mmlu_is_one_group_of_57_subjects(tmp_path: Path) -> None:
    rows = [{"question": "Which? ", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "x"}]
    subjects = mmlu_subjects()
    for subject in subjects:
        write_rows(tmp_path / subject.file("test"), rows * 2)
        write_rows(tmp_path / subject.file("dev"), rows * 5)
    with opened_tasks([MMLU], _source(tmp_path), 5) as (manager, names):
        loaded = manager.load(names)
    assert names == [MMLU]
    assert len(loaded["tasks"]) == len(subjects) == 57
    assert set(loaded["groups"]) == {
        MMLU,
        *(f"mmlu_{part}" for part in ("stem", "humanities", "other", "social_sciences")),
    }
    theirs = _harness(subjects[0], {"test": rows * 2, "dev": rows * 5})
    assert _prompts(loaded["tasks"][subjects[0].name], 2, 5) == _prompts(theirs, 2, 5)
    (tmp_path / subjects[3].file("test")).unlink()
    with pytest.raises(InputError, match=subjects[3].name), opened_tasks([MMLU], _source(tmp_path)):
        pass


def test_names_are_aliases_patterns_and_lists(documents: Path) -> None:
    assert task_names(" arc_e, piqa,arc_easy,hs") == ["arc_easy", "piqa", "hellaswag"]
    with opened_tasks(["arc_*", "piqa"], _source(documents)) as (_, names):
        assert names == ["arc_challenge", "arc_easy", "piqa"]
    with pytest.raises(InputError, match="names no task"):
        task_names(" ,")


@pytest.mark.parametrize(("name", "near"), [("arc_eazy", "arc_easy"), ("hellaswg", "hellaswag"), ("mlmu", "mmlu")])
def test_an_unknown_task_is_answered_with_the_nearest(name: str, near: str, documents: Path) -> None:
    with (
        pytest.raises(InputError, match=rf"there is no task '{name}'; near: .*{near}"),
        opened_tasks([name], _source(documents)),
    ):
        pass


def test_own_tasks_are_found(documents: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        (harness_tasks() / "piqa/piqa.yaml").read_text().replace("task: piqa", "task: mine")
    )
    with opened_tasks(["mine", "piqa"], _source(documents), include_path=str(tmp_path)) as (manager, names):
        assert names == ["mine", "piqa"]
        assert str(manager.task_index["mine"].yaml_path) == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"goal": "a", "sol1": "b", "label": 0}\n', "lack sol2; piqa needs goal, sol1, sol2, label"),
        ('{"goal": "a"\n', "line 1: is not JSON"),
        ("[1]\n", "line 1: is not a JSON object"),
        ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n\n{"goal": "a"}\n', "line 3: has other fields"),
        ("\n", "holds no documents"),
        ("\udcff", "cannot be read as UTF-8"),
    ],
)
def test_broken_documents_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message), opened_tasks(["piqa"], _source(tmp_path)):
        pass


def test_documents_that_are_missing_are_named(tmp_path: Path) -> None:
    for task in ("wikitext", "boolq", "mmlu"):
        with (
            pytest.raises(InputError, match=r"there is no .*so it cannot be scored"),
            opened_tasks([task], _source(tmp_path)),
        ):
            pass


def test_separators_inside_documents_stay(tmp_path: Path) -> None:
    rows = [{"goal": "a\u2028b\x85c", "sol1": "d", "sol2": "e", "label": 0}]
    assert local.read(write_rows(tmp_path / "rows.jsonl", rows)) == rows


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_means_not_to_ask(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the hub was asked"))
    assert why_no_hub() == f"{variable} is set"


class _Session:
    def __init__(self, status: int | None) -> None:
        self.status = status

    def head(self, _url: str, **_options: Any) -> Any:
        if self.status is None:
            raise OSError("no network")
        return type("Response", (), {"status_code": self.status})


@pytest.mark.parametrize(("status", "hub"), [(200, True), (302, True), (503, False), (None, False)])
def test_auto_takes_the_hub_where_it_answers(
    status: int | None, hub: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: _Session(status))
    monkeypatch.setattr("qtale.demo.tasks", lambda: tmp_path)
    with caplog.at_level("INFO", logger="qtale"):
        assert choose("auto") == (Source("hub", None) if hub else Source("bundled", tmp_path))
    assert len(caplog.records) == (0 if hub else 1)


def test_a_data_folder_must_exist(tmp_path: Path) -> None:
    assert choose(str(tmp_path)).folder == tmp_path
    with pytest.raises(InputError, match="there is no such folder"):
        choose(str(tmp_path / "absent"))
