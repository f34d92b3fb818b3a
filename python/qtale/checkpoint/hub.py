"""From what a user calls a model to a folder on this machine: a local path, or a name on the HuggingFace hub."""

from __future__ import annotations

import re
from pathlib import Path

from qtale.checkpoint.index import INDEX_FILE, SINGLE_FILE, read_index
from qtale.errors import CheckpointError, NetworkError

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model: str | Path) -> Path:
    """The folder of a model: ``model`` itself where it is one, else the hub's snapshot of that name (downloaded once).

    Only safetensors, configuration and tokenizer files are fetched. Raises CheckpointError where there is no such
    model and NetworkError where the hub cannot be asked.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        hint = "run `qtale import-gguf` on it first" if path.suffix == ".gguf" else "give the folder that holds it"
        raise CheckpointError(f"{model}: is a file, not a model folder; {hint}.")
    name = str(model)
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{name}: there is no such folder; give the path of a model folder or a hub name.")
    folder = _download(name, _SMALL_FILES)
    shards = sorted(set(read_index(folder).values())) if (folder / INDEX_FILE).is_file() else [SINGLE_FILE]
    return _download(name, [*_SMALL_FILES, *shards])


def _download(name: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{name}: there is no such folder here, and the hub has no such model that you may read "
            "(a private or gated one needs HF_TOKEN)."
        ) from error
    except (OSError, errors.EntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NetworkError(
            f"{name}: there is no such folder here, and the hub could not be asked for it ({reason}); "
            "give the path of a model folder, or try again with a network."
        ) from error
