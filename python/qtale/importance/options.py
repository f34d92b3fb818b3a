"""What a measurement is asked to do: plain settings, checked when they are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qtale.errors import InputError
from qtale.spec import QuantSpec

HIDDEN_METRICS = ("jaccard", "lim", "bi")
WEIGHT_METRICS = ("zd", "error", "random")
LOSS_METRICS = ("fisher", "noise", "kl")
METRICS = (*HIDDEN_METRICS, *WEIGHT_METRICS, *LOSS_METRICS)
# Fisher is one backward pass over a part of the sequences, and plans by it are as good as by ``kl``, whose many
# forward passes grow with the square of the depth.
DEFAULT_METRICS = (*HIDDEN_METRICS, *WEIGHT_METRICS, "fisher")
# Widths for which the errors of every module are kept, whatever width the score is of.
ERROR_BITS = (8, 4, 3, 2)

_CHOICES = {
    "matrix": ("embed", "lm_head"),
    "norm": ("none", "final"),
    "positions": ("last", "all"),
    "zd_tail": ("upper", "both"),
    "zd_order": ("paper", "reversed"),
}


@dataclass(frozen=True)
class MeasureOptions:
    """Settings of a measurement; every one of them is written into importance.json.

    * ``metrics``: what to score layers by, of ``METRICS``.
    * ``num_sequences`` sequences of ``seq_len`` tokens are drawn from the calibration text with ``seed``.
    * ``top_k``, ``matrix``, ``norm``: LSAQ's token sets are the ``top_k`` largest of hidden state times ``matrix``
      ("embed" or "lm_head"), after the model's final norm ("final") or without it ("none").
    * ``positions``: "last" takes the hidden state at the last token of each sequence (jaccard, lim), "all" the mean
      over every token. BI is over all tokens always.
    * ``zd_tail``: "upper" counts weights with z > 1, "both" those with |z| > 1. ``zd_order``: "paper" calls layers with
      a *smaller* share more important, as LWQ does, "reversed" those with a larger one.
    * ``error_bits``, ``group_size``: the quantization whose error is scored by ``error``, ``fisher`` and ``kl``.
    * ``loss_sequences``: how many of the sequences ``fisher``, ``noise`` and ``kl`` use.
    * ``noise``: relative size t of the noise that ``noise`` adds to the weights of a layer.
    """

    metrics: tuple[str, ...] = DEFAULT_METRICS
    num_sequences: int = 32
    seq_len: int = 512
    seed: int = 0
    top_k: int = 500
    matrix: str = "embed"
    norm: str = "none"
    positions: str = "last"
    zd_tail: str = "upper"
    zd_order: str = "paper"
    error_bits: int = 4
    group_size: int | str = "auto"
    loss_sequences: int = 8
    noise: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown or not self.metrics:
            asked = ", ".join(map(repr, unknown)) or "nothing"
            raise InputError(f"measure: metrics names {asked}; use some of {', '.join(METRICS)}.")
        if len(set(self.metrics)) != len(self.metrics):
            raise InputError(f"measure: metrics {','.join(self.metrics)} names one of them twice; name each once.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"measure: {name} {getattr(self, name)!r} is not known; use {' or '.join(choices)}.")
        for name, least in (("num_sequences", 1), ("seq_len", 2), ("top_k", 1), ("loss_sequences", 1), ("seed", 0)):
            _check_count(name, getattr(self, name), least)
        if not 0 < self.noise < 1:
            raise InputError(f"measure: noise {self.noise!r} must lie between 0 and 1; 0.1 is the default.")
        self.spec(self.error_bits)

    def spec(self, num_bits: int) -> QuantSpec:
        """The symmetric quantization to ``num_bits`` whose error is measured; InputError for unknown bits or groups."""
        return QuantSpec(num_bits, self.group_size)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all settings."""
        return {**dataclasses.asdict(self), "metrics": list(self.metrics)}


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"measure: {name} {value!r} must be a whole number of at least {least}.")
