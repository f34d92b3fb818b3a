"""The tasks that qtale can score from local files, and the short names it takes for them. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

ALIASES = {
    "arc_e": "arc_easy",
    "arc_c": "arc_challenge",
    "hs": "hellaswag",
    "wg": "winogrande",
    "obqa": "openbookqa",
    "siqa": "social_iqa",
    "social_i_qa": "social_iqa",
    "wikitext2": "wikitext",
}
MMLU = "mmlu"
WIKITEXT = "wikitext"
_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class LocalTask:
    """A task of the harness and where its documents lie in a data folder.

    ``yaml`` is the harness's own file, below its tasks folder; ``scored`` the split that it scores, ``shots`` the one
    it takes few-shot examples from; ``fields`` what each document must have, all of them original names.
    """

    name: str
    yaml: str
    folder: str
    fields: tuple[str, ...]
    scored: str = "validation"
    shots: str = "train"
    suffix: str = "jsonl"
    process_docs: str | None = None

    def file(self, split: str) -> str:
        """The path of a split's file in a data folder."""
        name = f"wiki.{split.replace('validation', 'valid')}" if self.suffix == "raw" else split
        return f"{self.folder}/{name}.{self.suffix}"


_QUESTION = ("question", "choices", "answerKey")
TASKS = {
    task.name: task
    for task in (
        LocalTask("arc_easy", "arc/arc_easy.yaml", "arc_easy", _QUESTION, "test"),
        LocalTask("arc_challenge", "arc/arc_challenge.yaml", "arc_challenge", _QUESTION, "test"),
        LocalTask(
            "openbookqa", "openbookqa/openbookqa.yaml", "openbookqa", ("question_stem", "choices", "answerKey"), "test"
        ),
        LocalTask("piqa", "piqa/piqa.yaml", "piqa", ("goal", "sol1", "sol2", "label")),
        LocalTask(
            "boolq", "super_glue/boolq/default.yaml", "boolq", ("question", "passage"), process_docs="boolq_docs"
        ),
        LocalTask(
            "hellaswag", "hellaswag/hellaswag.yaml", "hellaswag", ("endings", "label"), process_docs="hellaswag_docs"
        ),
        LocalTask("winogrande", "winogrande/default.yaml", "winogrande", ("sentence", "option1", "option2", "answer")),
        LocalTask(
            "social_iqa",
            "siqa/siqa.yaml",
            "social_i_qa",
            ("context", "question", "answerA", "answerB", "answerC", "label"),
        ),
        LocalTask(WIKITEXT, "wikitext/wikitext.yaml", "wikitext2", (), "test", suffix="raw"),
    )
}
MMLU_YAML = "mmlu/default"
MMLU_FIELDS = ("question", "choices", "answer")


def mmlu_subject(task: str, yaml: str) -> LocalTask:
    """One of MMLU's subjects, ``task`` being "mmlu_<subject>"."""
    subject = task.removeprefix(f"{MMLU}_")
    return LocalTask(task, yaml, f"{MMLU}/{subject}", MMLU_FIELDS, "test", "dev")
