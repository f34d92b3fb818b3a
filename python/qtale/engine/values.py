"""Values of a config.json, checked as they are read: it is untrusted input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qtale.errors import CheckpointError, UnsupportedError

# More than any model has; keeps a hostile config from asking for memory before its tensors are compared with it.
MAX_COUNT = 1 << 30


class Values:
    """A JSON object whose fields are read with a type; ``where`` names it in errors."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def get(self, key: str) -> Any:
        """The field as it is, None where it is absent."""
        return self.fields.get(key)

    def count(self, key: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        """A positive integer up to ``most``; ``default`` where the field is absent or null."""
        value = self.fields.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 < value <= most:
            raise CheckpointError(f"{self.where}: {key} is {value!r}; it must be an integer from 1 to {most}.")
        return value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A finite number above ``least``; ``default`` where the field is absent or null."""
        value = self.fields.get(key)
        if value is None and default is not None:
            return default
        try:
            number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > least):
            raise CheckpointError(f"{self.where}: {key} is {value!r}; it must be a number above {least:g}.")
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean; ``default`` where the field is absent or null."""
        value = self.fields.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {value!r}; it must be true or false.")
        return value

    def section(self, key: str) -> Values | None:
        """A nested object; None where the field is absent or null."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where}: {key} must be an object, not {type(value).__name__}.")
        return Values(value, f"{self.where}: {key}")

    def unsupported(self, what: str) -> UnsupportedError:
        """The error for a model that the engine does not run."""
        return UnsupportedError(f"{self.where}: {what}; the engine does not run that. Use qtale.load_torch for it.")
