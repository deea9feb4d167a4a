from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.gate import Accuracy, Gate, Instance, Tolerance


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("instance", Gate.instance()),
        (" Accuracy ", Gate.accuracy()),
        ("instance-in-target", Gate.instance_in_target()),
        ("tolerance:3", Gate.tolerance(3)),
        ("tolerance: 3", Tolerance(3)),
        ("tolerance:0", Tolerance(0)),
        ("tolerance:0.01", Gate.tolerance(0.01)),
        ("tolerance:1e-3", Tolerance(0.001)),
        ("tolerance:1%", Tolerance(0.01)),
        ("tolerance:0.5 %", Tolerance(0.005)),
        (Instance(), Instance()),
    ],
)
def test_parse_reads_every_form(text: str | Gate, gate: Gate) -> None:
    assert Gate.parse(text) == gate
    assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instanze", "`gate='instanze'` is no gate, did you mean 'instance'"),
        ("instance:3", "`gate='instance:3'` is no gate.\nHINT: write one of"),
        ("tolerance", "`gate='tolerance'` is no gate"),
        ("", "`gate=''` is no gate"),
        ("tolerance:few", "'few' is no number"),
        ("tolerance:x%", "'x%' is no number"),
        ("tolerance:-1", "`limit=-1` is no tolerance"),
        ("tolerance:150%", "`limit=1.5` is no tolerance"),
        ("tolerance:nan", "`limit=nan` is no tolerance"),
    ],
)
def test_parse_refuses_what_it_cannot_read(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Gate.parse(text)


def test_a_gate_on_the_target_needs_counts_of_one() -> None:
    gate = Gate.instance_in_target()
    counts = TargetCounts(kept=5, broken=2, repaired=1, failing=0, targeted=1, passed_in_target=3)
    assert gate.excess_of(counts) == 0
    assert gate.excess_of(replace(counts, broken_in_target=1)) == 1
    assert Gate.instance().excess_of(counts) == 2
    with pytest.raises(ConfigurationError, match="no failures are targeted here"):
        gate.excess_of(FlipCounts(kept=5, broken=0, repaired=1, failing=0))


@pytest.mark.parametrize("limit", [-1, -0.1, 1.5, 3.0, float("nan"), True, "3", None])
def test_a_tolerance_is_a_count_or_a_share(limit: object) -> None:
    with pytest.raises(ConfigurationError, match="HINT: give a whole number of samples from 0, or a fraction"):
        Gate.tolerance(limit)  # type: ignore[arg-type]


def test_a_numpy_whole_number_is_a_count() -> None:
    assert repr(Tolerance(torch.arange(4).numpy()[3])) == "Tolerance(limit=3)"


@pytest.mark.parametrize(
    ("gate", "allowed"),
    [
        (Instance(), 0),
        (Accuracy(), 7),
        (Tolerance(3), 3),
        (Tolerance(0.29), 29),  # 0.29 * 100 is 28.999999999999996
        (Tolerance(0.009), 0),
        (Tolerance(1.0), 100),
    ],
)
def test_how_many_may_break(gate: Gate, allowed: int) -> None:
    assert gate.allowed(FlipCounts(kept=90, broken=10, repaired=7, failing=5)) == allowed


@pytest.mark.parametrize(
    ("value", "gate"),
    [
        ("instance", "instance"),
        ('{"class_path": "lightning_nrl.gate.Accuracy"}', Accuracy()),
        ('{"class_path": "lightning_nrl.gate.Tolerance", "init_args": {"limit": 3}}', Tolerance(3)),
        ('{"class_path": "lightning_nrl.gate.Tolerance", "init_args": {"limit": 0.01}}', Tolerance(0.01)),
    ],
)
def test_a_command_line_can_say_it(value: str, gate: str | Gate) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--gate", type=str | Gate)
    assert parser.instantiate(parser.parse_args([f"--gate={value}"])).gate == gate
