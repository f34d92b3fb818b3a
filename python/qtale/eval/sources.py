"""Where task documents come from: the HuggingFace hub, the bundled demo tasks, or a folder of the user's."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from qtale.errors import InputError

logger = logging.getLogger("qtale")

AUTO, HUB, BUNDLED = "auto", "hub", "bundled"
_PROBE_SECONDS = 4.0
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Source:
    """``folder`` is None for the hub; ``name`` says "hub", "bundled" or the user's folder."""

    name: str
    folder: Path | None


def choose(data: str) -> Source:
    """The source that ``--data`` asks for: "auto", "hub", "bundled" or a folder.

    "auto" takes the hub where it answers within seconds and HF_HUB_OFFLINE and HF_DATASETS_OFFLINE are unset, otherwise
    the bundled documents, and says which. Raises InputError for a folder that does not exist, and what
    ``qtale.demo.tasks`` raises.
    """
    if data == AUTO:
        reason = why_no_hub()
        if reason is None:
            return Source(HUB, None)
        logger.info("data: %s, so the bundled task documents are taken (--data hub|bundled|DIR chooses).", reason)
        data = BUNDLED
    if data == HUB:
        return Source(HUB, None)
    if data == BUNDLED:
        from qtale import demo

        return Source(BUNDLED, demo.tasks())
    folder = Path(data).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(
            f"--data {data}: there is no such folder; use auto, hub, bundled or a folder of task documents."
        )
    return Source(str(folder), folder)


def why_no_hub() -> str | None:
    """Why the hub cannot be asked, or None where it answers; takes a few seconds at most."""
    for variable in _OFFLINE_VARIABLES:
        if os.environ.get(variable, "").upper() in _TRUE:
            return f"{variable} is set"
    answers: list[bool] = []
    # A thread, because no timeout covers the resolution of the hub's name.
    probe = threading.Thread(target=_ask_hub, args=(answers,), daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    return None if any(answers) else "the HuggingFace hub does not answer"


def _ask_hub(answers: list[bool]) -> None:
    import huggingface_hub

    try:
        response = huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PROBE_SECONDS)
        answers.append(response.status_code < 500)
    except Exception as error:  # any failure of the network stack means the same here
        logger.debug("data: the hub does not answer: %r", error)
