"""Following the free memory: shrinks at once, grows with patience, and does not flap; no test waits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qtale
from plan_samples import save_model
from qtale.deployment import Deployment, DeployReport, Watcher, watch
from qtale.errors import CheckpointError, InputError
from qtale.memory import Budget, Device
from qtale.planner import Options

OPTIONS = Options(choices=(16, 8, 4, 3), group_size=32, context=32)
KIB = 1 << 10
# The model at 16 bits with its reserve takes 1.4 MiB, at 3 bits 641 KiB.
PLENTY, SOME, LITTLE, NOTHING = 4096 * KIB, 1000 * KIB, 700 * KIB, 0


class Room:
    """What a watcher sees, set by the test."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def __call__(self) -> Budget:
        return Budget(self.num_bytes, "the test")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(params=["engine", "torch"])
def deployment(request: pytest.FixtureRequest, dense: Path) -> Deployment:
    return qtale.deploy(dense, "1GiB", options=OPTIONS, backend=request.param, progress=False)


def steps(watcher: Watcher, count: int) -> list[DeployReport]:
    return [report for report in (watcher.step() for _ in range(count)) if report is not None]


def test_it_shrinks_at_once_and_grows_with_patience(deployment: Deployment) -> None:
    room, whole = Room(PLENTY), deployment.weights_bytes
    watcher = Watcher(deployment, look=room, patience=3)
    assert steps(watcher, 5) == []
    room.num_bytes = SOME
    report = watcher.step()
    assert report is not None
    assert report.bytes_freed > 0
    assert deployment.needed_bytes <= 0.95 * SOME
    assert steps(watcher, 5) == []
    room.num_bytes = PLENTY
    assert steps(watcher, 2) == []
    assert len(steps(watcher, 1)) == 1
    assert deployment.weights_bytes == whole
    assert steps(watcher, 5) == []


def test_room_that_comes_and_goes_does_not_make_it_grow(deployment: Deployment) -> None:
    room = Room(SOME)
    watcher = Watcher(deployment, look=room, patience=3)
    assert len(steps(watcher, 3)) == 1
    for _ in range(5):
        room.num_bytes = PLENTY
        assert steps(watcher, 2) == []
        room.num_bytes = SOME
        assert steps(watcher, 1) == []


def test_swings_within_the_margin_change_nothing(deployment: Deployment) -> None:
    room = Room(SOME)
    watcher = Watcher(deployment, look=room, margin=0.05)
    assert len(steps(watcher, 10)) == 1
    for step in range(40):
        room.num_bytes = int(SOME * (1 + (-1) ** step * 0.045))
        assert watcher.step() is None
    # Without the margin the same swing does change it.
    room.num_bytes = int(SOME * 1.045)
    steady = Watcher(deployment, look=room, margin=0.0, patience=1)
    assert len(steps(steady, 1)) == 1


def test_when_nothing_fits_it_runs_as_small_as_it_gets_and_says_so_once(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "qtale")
    room = Room(NOTHING)
    watcher = Watcher(deployment, look=room)
    assert len(steps(watcher, 4)) == 1
    assert {layer.num_bits for layer in deployment.plan.layers} == {3}
    assert caplog.text.count("as small as it gets") == 1
    assert "the least budget that would do is" in caplog.text


def test_a_change_that_fails_is_logged_and_tried_again(
    deployment: Deployment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "qtale")

    def broken(**arguments: Any) -> DeployReport:
        raise CheckpointError("model.safetensors: is truncated.")

    watcher = Watcher(deployment, look=Room(LITTLE))
    with monkeypatch.context() as patched:
        patched.setattr(deployment, "replan", broken)
        assert steps(watcher, 3) == []
    assert caplog.text.count("the model was not changed: model.safetensors: is truncated.") == 1
    assert len(steps(watcher, 1)) == 1


def test_a_given_budget_is_a_limit_beside_the_free_memory(dense: Path) -> None:
    device = Device("cpu", "main memory", PLENTY, PLENTY)
    deployment = qtale.deploy(dense, SOME, options=OPTIONS, progress=False, probe=lambda: [device])
    watcher = Watcher(deployment, patience=1)
    assert steps(watcher, 5) == []
    device = Device("cpu", "main memory", PLENTY, 0)
    assert len(steps(watcher, 1)) == 1
    small = deployment.weights_bytes
    device = Device("cpu", "main memory", PLENTY, PLENTY)
    assert len(steps(watcher, 5)) == 1
    assert deployment.weights_bytes > small
    assert deployment.needed_bytes <= SOME


def test_watch_looks_until_it_is_interrupted(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qtale")
    room, seen, naps = Room(PLENTY), [], iter((SOME, SOME, LITTLE, PLENTY, PLENTY, PLENTY))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        following = next(naps, None)
        if following is None:
            raise KeyboardInterrupt
        room.num_bytes = following

    with pytest.raises(KeyboardInterrupt):
        watch(deployment, interval=2.5, look=room, sleep=sleep, changed=seen.append)
    assert slept == [2.5] * 7
    assert [report.bytes_freed > 0 for report in seen] == [True, True, False]
    assert caplog.text.count("the test, room for") == 3
    assert "from 16 to 8 bits" in caplog.text


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda it: Watcher(it, margin=1.0), "margin 1.0"),
        (lambda it: Watcher(it, margin=-0.1), "margin -0.1"),
        (lambda it: Watcher(it, patience=0), "patience 0"),
        (lambda it: watch(it, interval=0), "interval 0 must be more than 0"),
        (lambda it: watch(it, interval=float("nan")), "interval nan must be more than 0"),
    ],
)
def test_wrong_values(deployment: Deployment, call: Callable[[Deployment], Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call(deployment)
