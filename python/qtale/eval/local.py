"""Task documents of local files, as the harness's tasks take them. The harness calls these by their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]


def load(data_files: Mapping[str, str], **_metadata: Any) -> dict[str, Dataset]:
    """A dataset for each split; ``.jsonl`` files hold a document a line, ``.raw`` ones WikiText's articles.

    Raises InputError naming file and line where a file cannot be read.
    """
    from datasets import Dataset

    return {split: Dataset.from_list(read(Path(file))) for split, file in data_files.items()}


def read(file: Path) -> list[Row]:
    """The documents of one file; raises InputError where it holds none or is broken."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
    rows = [{"page": page} for page in articles(text)] if file.suffix == ".raw" else list(_json_rows(file, text))
    if not rows:
        raise InputError(f"{file}: holds no documents.")
    return rows


def _json_rows(file: Path, text: str) -> Iterator[Row]:
    fields: set[str] | None = None
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {number}: is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number}: is not a JSON object.")
        fields = fields or set(row)
        if set(row) != fields:
            differing = ", ".join(sorted(fields ^ set(row)))
            raise InputError(f"{file}, line {number}: has other fields than the first document ({differing}).")
        yield row


def articles(text: str) -> list[str]:
    """WikiText split into its articles, as the document-level set that the harness scores splits it."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _is_title(line.strip()):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _is_title(line: str) -> bool:
    return line.startswith("= ") and line.endswith(" =") and not line.startswith("= =") and not line.endswith("= =")


def hellaswag_docs(dataset: Dataset) -> Dataset:
    """HellaSwag as published, or as already cleaned: ``query``, ``endings`` and a numeric ``label``."""
    if "ctx_a" in dataset.column_names:
        from lm_eval.tasks.hellaswag.utils import process_docs

        return process_docs(dataset)
    return dataset.map(lambda row: {"choices": row["endings"], "gold": int(row["label"])})


def boolq_docs(dataset: Dataset) -> Dataset:
    """BoolQ as published has a boolean ``answer``, where SuperGLUE's copy has a ``label`` of 0 or 1."""
    if "label" in dataset.column_names:
        return dataset
    return dataset.map(lambda row: {"label": int(row["answer"])})
