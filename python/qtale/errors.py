"""The errors of qtale: one hierarchy, every message a sentence that names the operation, the value and what to do."""

from __future__ import annotations


class Error(Exception):
    """Root of everything that qtale raises on purpose."""


class InputError(Error, ValueError):
    """An argument has a value that the operation does not accept."""


class CheckpointError(Error):
    """A model folder or file is missing, broken, hostile or not what it says it is."""


class UnsupportedError(Error):
    """Something valid that qtale cannot do; the message names what can be used instead."""


class NetworkError(Error):
    """A download failed; the message says what to do without a network."""
