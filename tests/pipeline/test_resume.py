"""A repair that was killed ends, when it is called again, as one that was not."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_problems import FakeTraining, between, resume_store, retrained, same, snapshot
from toy_repairs import known, quick, trained, unseen

from lightning_nrl import ParticleSwarm, repair_module
from lightning_nrl._utils.timing import Observer
from lightning_nrl.methods import Auto, Convex, FineTunePolish, Polish
from lightning_nrl.pipeline import Outcome

METHODS = {
    "auto": Auto(ParticleSwarm(particles=12, iterations=12)),
    "convex": Convex(),
    "finetune-polish": FineTunePolish(),
    "polish": Polish(),
    "swarm": ParticleSwarm(particles=12, iterations=12),
}
if importlib.util.find_spec("peft") is not None:
    METHODS["lora"] = FineTunePolish(lora=2)


class Death(BaseException):
    pass


class Mortal(Observer):
    """An observer that dies when it has been told so often how it goes."""

    def __init__(self, life: int | None) -> None:
        self.life, self.told, self.said = life, 0, ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.search()
        yield

    def search(self, *args: Any) -> None:
        self.told += 1
        if self.life is not None and self.told > self.life:
            raise Death(self.said)

    def announce(self, text: str) -> None:
        self.said = text


def repaired(
    folder: Path | None,
    life: int | None = None,
    method: str = "swarm",
    seed: int = 0,
    origin: object = None,
    **settings: Any,
) -> tuple[Outcome, Mortal, Any]:
    model, observer = trained(seed=seed), Mortal(life)
    # Not all of the way, so that something is left for the rungs above.
    training = FakeTraining(between(snapshot(model), retrained(model), 0.4))
    work = resume_store(folder)
    training.origin = origin
    outcome = repair_module(
        model,
        known(),
        quick(method=METHODS[method], **settings),
        unseen=unseen(),
        training=training if method == "auto" else None,
        observer=observer,
        work=work,
    )
    return outcome, observer, work


@cache
def whole(method: str) -> Outcome:
    """What a repair gives that was never stopped."""
    return repaired(None, method=method)[0]


def timeless(value: Any) -> Any:
    """A report without seconds and passes: a resumed repair repeats the pass that it judges."""
    if isinstance(value, dict):
        costs = ("seconds", "passes")
        return {name: timeless(item) for name, item in value.items() if name not in costs}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one.parameters is not None
    assert other.parameters is not None
    assert same(one.parameters, other.parameters)
    if one.adapter is not None:
        assert other.adapter is not None
        assert one.adapter.config == other.adapter.config
        assert same(one.adapter.state, other.adapter.state)
    assert timeless(json.loads(one.report.to_json())) == timeless(
        json.loads(other.report.to_json())
    )


@pytest.mark.parametrize(
    ("method", "lives"),
    [
        ("swarm", (7,)),
        ("finetune-polish", (43,)),
        ("auto", (17, 8)),
        pytest.param(
            "lora", (43,), marks=pytest.mark.skipif("lora" not in METHODS, reason="no `peft`")
        ),
    ],
)
def test_a_repair_that_died_ends_as_one_that_did_not(tmp_path, method, lives):
    for life in lives:
        with pytest.raises(Death):
            repaired(tmp_path, life, method)
    found, observer, work = repaired(tmp_path, method=method)
    assert "resumes after the finished steps" in observer.said
    assert_same(whole(method), found)
    work.done()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("NRL_DEATHS" not in os.environ, reason="it takes minutes")
@pytest.mark.parametrize("method", METHODS)
def test_a_repair_may_die_at_any_moment(tmp_path, method):
    observer = repaired(None, method=method)[1]
    for life in range(observer.told):
        with pytest.raises(Death):
            repaired(tmp_path, life, method)
        found, _, work = repaired(tmp_path, method=method)
        assert_same(whole(method), found)
        work.done()


def test_saved_work_of_another_repair_is_not_used_and_that_is_said(tmp_path):
    with pytest.raises(Death):
        repaired(tmp_path, 7)
    for part, changes in (("settings", {"max_time": 500.0}), ("weights and data", {"seed": 3})):
        outcome, observer, work = repaired(tmp_path, **changes)
        assert f"is from a repair with other {part}; delete it" in observer.said
        assert_same(repaired(None, **changes)[0], outcome)
        work.done()


def test_another_training_is_another_repair(tmp_path):
    with pytest.raises(Death):
        repaired(tmp_path, 17, "auto", origin=["a rate of 0.1"])
    with pytest.raises(Death, match="is from a repair with other training; delete it"):
        repaired(tmp_path, 3, "auto", origin=["a rate of 0.2"])


def flip(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_damaged_files_are_not_used_and_the_result_is_the_same(tmp_path):
    with pytest.raises(Death):
        repaired(tmp_path, 24, "auto")
    (folder,) = tmp_path.iterdir()
    files = [path for path in folder.iterdir() if path.suffix != ".json"]
    assert len(files) >= 2
    for path in files:
        path.write_bytes(flip(path.read_bytes()))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found, _, _ = repaired(tmp_path, method="auto")
    assert any("is not used: the checksum is wrong" in str(one.message) for one in warned)
    assert_same(whole("auto"), found)


@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
def test_a_killed_process_is_resumed(tmp_path):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        while True:
            _, _, work = repaired(tmp_path, method="finetune-polish")
            work.done()
    end = time.monotonic() + 60
    while not any(tmp_path.glob("*/*.finished")) and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert_same(whole("finetune-polish"), repaired(tmp_path, method="finetune-polish")[0])
