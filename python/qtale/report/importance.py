"""The scores of every layer as a table for terminals."""

from __future__ import annotations

from qtale.importance.file import Importance
from qtale.report.text import table

_WORDS = 5


def render(importance: Importance) -> str:
    """A line for each layer: its score by every metric, its rank by the first one, and the tokens it points to."""
    first = next(iter(importance.scores))
    ranks = {layer: rank + 1 for rank, layer in enumerate(importance.ranking(first))}
    shows_words = bool(importance.words and importance.token_sets)
    header = ["layer", *importance.scores, f"rank by {first}", *(["points to"] if shows_words else [])]
    lines = []
    for layer in range(importance.model["num_layers"]):
        scores = [f"{values[layer]:.4g}" for values in importance.scores.values()]
        words = [_words(importance, layer)] if shows_words else []
        lines.append([str(layer), *scores, str(ranks[layer]), *words])
    settings = importance.settings
    shown = f"{settings['num_sequences']} sequences of {settings['seq_len']} tokens, seed {settings['seed']}"
    note = f"higher is more important; {shown}"
    if shows_words:
        note += "; the tokens are those of the first sequence after the layer"
    return f"{table(header, lines)}\n\n{note}"


def _words(importance: Importance, layer: int) -> str:
    tokens = importance.token_sets[0][layer + 1][:_WORDS]
    return " ".join(repr(importance.words[str(token)]) for token in tokens)
