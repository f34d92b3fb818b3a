"""Mutated model folders never crash the loader: each loads or is refused with a sentence.

QTALE_MUTATIONS sets how many are tried (default 300).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qtale
from engine_samples import make_model
from eval_samples import tiny_llama
from qtale.errors import Error
from qtale.integrations.routing import router_weights
from qtale.nn import Router
from qtale.routing import Routing, write_routing

COUNT = int(os.environ.get("QTALE_MUTATIONS", "300"))
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 64, 2**31, 2**63, -(2**40), 1e308, -0.5, 1e-9, float("nan"), float("inf")),
    *(None, True, "", "x", "llama", "default", [], [1], [None], {}, {"rope_type": "yarn"}, {"a": [0]}),
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense folder with routers, a quantized one with a bias and yarn, one of shards, and one of another family."""
    root = tmp_path_factory.mktemp("originals")
    tiny_llama(num_hidden_layers=1, vocab_size=40).save_pretrained(root / "dense")
    write_routing(root / "dense", Routing({0: router_weights(Router(64, 3))}), 1, 64)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    source = tiny_llama(num_hidden_layers=1, vocab_size=40, attention_bias=True, rope_parameters=yarn)
    source.half().save_pretrained(root / "source")
    qtale.quantize(root / "source", root / "packed", qtale.QuantSpec(4, 32, False), progress=False)
    tiny_llama(num_hidden_layers=1, vocab_size=40).half().save_pretrained(root / "sharded", max_shard_size="20KB")
    windows: dict[str, Any] = {"sliding_window": 2, "use_sliding_window": True, "layer_types": ["sliding_attention"]}
    qwen = make_model("qwen3", num_hidden_layers=1, vocab_size=40, head_dim=16, **windows)
    qwen.bfloat16().save_pretrained(root / "qwen3")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    return [root / name for name in ("dense", "packed", "sharded", "qwen3")]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value can be changed."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(value: Any, draw: random.Random) -> Any:
    """The value with one place deleted, replaced or multiplied."""
    place = draw.choice(places(value))
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    old = parent[place[-1]]
    kind = draw.random()
    if kind < 0.15:
        del parent[place[-1]]
    elif kind < 0.4 and isinstance(old, (int, float)) and not isinstance(old, bool):
        parent[place[-1]] = draw.choice([old * 2, old + 1, -old, old // 2, old * 1000])
    else:
        parent[place[-1]] = draw.choice(VALUES)
    return value


def change_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(changed(json.loads(path.read_text()), draw)))


def change_header(path: Path, draw: random.Random) -> None:
    """One entry of a safetensors header, its length kept true or not."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(changed(json.loads(raw[8 : 8 + length]), draw)).encode()
    told = len(header) if draw.random() < 0.9 else draw.choice([0, len(header) - 1, 2**40, 2**63])
    path.write_bytes(told.to_bytes(8, "little") + header + raw[8 + length :])


def change_bytes(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 4)):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    path.write_bytes(raw[: draw.randrange(len(raw))] if draw.random() < 0.2 else raw)


def mutate(folder: Path, draw: random.Random) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    settings = [folder / "config.json", *folder.glob("qtale.json"), *folder.glob("*.index.json")]
    steps: list[Callable[[], None]] = [
        lambda: change_json(draw.choice(settings), draw),
        lambda: change_header(draw.choice(weights), draw),
        lambda: change_bytes(draw.choice(weights + settings), draw),
    ]
    for _ in range(draw.randint(1, 2)):
        try:
            draw.choices(steps, weights=[5, 3, 2])[0]()
        except (ValueError, UnicodeDecodeError, IndexError):
            return  # the first change left nothing that the second could read


def test_mutated_folders_load_or_are_refused(originals: list[Path], tmp_path: Path) -> None:
    loaded, refusals = 0, list[str]()
    for seed in range(COUNT):
        draw = random.Random(seed)
        folder = tmp_path / "folder"
        shutil.copytree(draw.choice(originals), folder)
        mutate(folder, draw)
        try:
            with qtale.load(folder, progress=False, context=64) as engine:
                engine.logits([1, 2, 3])
            loaded += 1
        except Error as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    assert 0 < loaded < COUNT
    assert all(refusal.strip() for refusal in refusals)
