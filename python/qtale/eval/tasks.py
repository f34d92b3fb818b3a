"""From the names that a user gives to tasks of the harness, scanning none of its thousands of files without need."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qtale.errors import InputError
from qtale.eval.catalog import ALIASES, MMLU, MMLU_YAML, TASKS, LocalTask, mmlu_subject
from qtale.eval.local import read
from qtale.eval.sources import Source

logger = logging.getLogger("qtale")

_SPLIT_KEYS = {
    "train": "training_split",
    "validation": "validation_split",
    "test": "test_split",
    "dev": "fewshot_split",
}
_FUNCTIONS = "qtale.eval.local"


def task_names(text: str | Sequence[str]) -> list[str]:
    """Names from a comma-separated list, aliases replaced, each once; InputError where there is none."""
    given = text.split(",") if isinstance(text, str) else text
    names = [ALIASES.get(name.strip(), name.strip()) for name in given if name.strip()]
    if not names:
        raise InputError("--tasks: names no task; give some, as in --tasks arc_e,piqa.")
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def opened_tasks(
    names: Sequence[str], source: Source, num_fewshot: int | None = None, include_path: str | None = None
) -> Iterator[tuple[Any, list[str]]]:
    """The harness's TaskManager and the names of its tasks, for as long as the context lasts.

    With a folder as source, a task is the harness's own YAML with nothing but the place of its documents replaced.
    Tasks of ``include_path`` go before others of the same name. Raises InputError for unknown tasks, naming the
    nearest, and for documents that are missing.
    """
    own = [include_path] if include_path else []
    if source.folder is None:
        manager = _hub_manager(names, own)
        yield manager, _expand(names, manager.all_tasks, source)
        return
    with tempfile.TemporaryDirectory(prefix="qtale-tasks-") as folder:
        _write_configs(names, source.folder, num_fewshot or 0, Path(folder))
        manager = _manager([folder, *own])
        yield manager, _expand(names, manager.all_tasks, source)


def _hub_manager(names: Sequence[str], own: list[str]) -> Any:
    folders = sorted({str((harness_tasks() / task.yaml).parent) for task in _wanted(names)})
    manager = _manager([*folders, *own])
    if all(name in manager.all_tasks for name in names):
        return manager
    logger.info("eval: reading the index of all tasks of lm-eval, which takes about ten seconds")
    return _manager([str(harness_tasks()), *own])


def _manager(paths: list[str]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths), include_defaults=False)


def _write_configs(names: Sequence[str], documents: Path, num_fewshot: int, folder: Path) -> None:
    for task in _wanted(names):
        if (documents / task.file(task.scored)).is_file():
            (folder / f"{task.name}.yaml").write_text(_config(task, documents, num_fewshot), encoding="utf-8")
        elif task.name in names or task.folder.startswith(MMLU):
            raise InputError(
                f"{task.name}: there is no {documents / task.file(task.scored)}, so it cannot be scored from this "
                "folder; use --data hub, or --data DIR with that file."
            )
    for group in _wanted_groups(names):
        (folder / group.name).write_text(f"include: {json.dumps(str(group))}\n", encoding="utf-8")


def _config(task: LocalTask, documents: Path, num_fewshot: int) -> str:
    """A task file that includes the harness's own and takes its documents from a folder."""
    splits = [task.scored, task.shots] if num_fewshot else [task.scored]
    files = {split: documents / task.file(split) for split in splits}
    for split, file in files.items():
        if not file.is_file():
            raise InputError(
                f"{task.name}: {num_fewshot} examples are asked for; they come from its {split} split, and there is "
                f"no {file}; use --num_fewshot 0, or --data with a source that has it."
            )
    _check_fields(task, files[task.scored])
    lines = {
        "include": str(harness_tasks() / task.yaml),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        **{key: None for split, key in _SPLIT_KEYS.items() if split not in files},
    }
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
    text += f"custom_dataset: !function {_FUNCTIONS}.load\n"
    return text + (f"process_docs: !function {_FUNCTIONS}.{task.process_docs}\n" if task.process_docs else "")


def _check_fields(task: LocalTask, file: Path) -> None:
    missing = [field for field in task.fields if field not in read(file)[0]]
    if missing:
        raise InputError(
            f"{file}: its documents lack {', '.join(missing)}; {task.name} needs {', '.join(task.fields)}."
        )


def harness_tasks() -> Path:
    """The folder of the harness's own task files, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError("eval: lm-eval is not installed; run `pip install lm-eval`.")
    return Path(spec.origin).parent / "tasks"


def mmlu_subjects() -> list[LocalTask]:
    """The subjects of MMLU, from the names of the harness's files."""
    files = sorted((harness_tasks() / MMLU_YAML).glob(f"{MMLU}_*.yaml"))
    return [mmlu_subject(file.stem, f"{MMLU_YAML}/{file.name}") for file in files]


def _is_mmlu(name: str) -> bool:
    return name.startswith(MMLU)


def _wanted(names: Sequence[str]) -> Iterator[LocalTask]:
    yield from (task for task in TASKS.values() if any(fnmatch.fnmatch(task.name, name) for name in names))
    if any(map(_is_mmlu, names)):
        yield from mmlu_subjects()


def _wanted_groups(names: Sequence[str]) -> list[Path]:
    return sorted((harness_tasks() / MMLU_YAML).glob(f"_{MMLU}*.yaml")) if any(map(_is_mmlu, names)) else []


def _expand(names: Sequence[str], known: Sequence[str], source: Source) -> list[str]:
    matched = [name for pattern in names for name in _matching(pattern, known, source)]
    return list(dict.fromkeys(matched))


def _matching(name: str, known: Sequence[str], source: Source) -> list[str]:
    found = [name] if name in known else fnmatch.filter(known, name)
    if found:
        return found
    near = difflib.get_close_matches(name, sorted({*known, *TASKS, *ALIASES, MMLU}), n=4, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    served = ", ".join([*TASKS, MMLU])
    local = f" From local documents: {served}; others need --data hub." if source.folder else ""
    raise InputError(f"--tasks: there is no task {name!r}{hint}.{local}")
