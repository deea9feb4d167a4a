from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_package import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from two_models import Given

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.serving import (
    UNKNOWN,
    MarginSwitch,
    SwitchedModule,
    Timing,
    choose_threshold,
    margin_over,
    report_switch,
)

INF, NAN = float("inf"), float("nan")


def switch(threshold: float, classes: Any = None) -> MarginSwitch:
    """A switch that is called with the logits of both models."""
    return MarginSwitch(Given(0), Given(1), threshold, classes)


OLD = torch.tensor([[9.0, 8.0, 7.0]]).repeat(5, 1)  # class 0
NEW = torch.tensor([[1.0, 3.0, 2.9], [0.0, 1.0, 1.5], [-2.0, -4.0, -1.5], [2.0, 1.9, 0.0], [2.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    ("threshold", "by_new"),
    [
        (-INF, [1, 1, 1, 1, 1]),
        (-0.1, [1, 1, 1, 1, 1]),
        (0, [1, 1, 1, 1, 1]),
        (0.5, [1, 1, 0, 1, 1]),
        (1.9, [1, 0, 0, 1, 1]),
        (2, [0, 0, 0, 1, 1]),
        (INF, [0, 0, 0, 1, 1]),
    ],
)
def test_the_new_model_answers_where_it_agrees_or_prefers_its_own_class_clearly(
    threshold: float, by_new: list[int]
) -> None:
    # The runner-up does not count: the first sample is served at 1.9, with another class only 0.1 below.
    assert margin_over(NEW, OLD.argmax(1)).tolist() == [2.0, 1.5, 0.5, 0.0, 0.0]
    served = switch(threshold)(OLD, NEW)
    assert torch.equal(served, torch.stack([(OLD, NEW)[new][i] for i, new in enumerate(by_new)]))


def test_of_two_equal_logits_the_first_is_the_prediction() -> None:
    old, new = torch.tensor([[0.0, 9.0]]), torch.tensor([[2.0, 2.0]])
    assert torch.equal(switch(0)(old, new), old)
    assert torch.equal(switch(-0.1)(old, new), new)


def test_inputs_are_passed_by_position_and_by_name() -> None:
    assert torch.equal(switch(1.0)(OLD, new=NEW), switch(1.0)(OLD, NEW))


@pytest.mark.parametrize("classes", [{0: 2, 1: 0, 2: 3}, [2, 0, 3]])
def test_old_classes_are_renumbered_and_unknown_ones_get_no_probability(classes: Any) -> None:
    new = torch.tensor([[0.0, 0.0, 0.0, 5.0], [0.0, 0.5, 0.0, 0.0]])  # the old one's class is 2 here
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        served = switch(1.0, classes)(OLD[:2].to(dtype), new.to(dtype))
        assert served.dtype == dtype
        assert served.tolist() == [[0.0, 0.0, 0.0, 5.0], [8.0, served[1, 1].item(), 9.0, 7.0]]
        assert served[1, 1] == torch.tensor(UNKNOWN, dtype=dtype)
        for f in (F.softmax, F.log_softmax):
            assert f(served, 1).isfinite().all()
        assert F.softmax(served, 1)[1, 1] == 0


@pytest.mark.parametrize(
    ("old", "new", "both"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_outputs_have_the_dtype_that_holds_both(old: torch.dtype, new: torch.dtype, both: torch.dtype) -> None:
    assert switch(1.0)(OLD.to(old), NEW.to(new)).dtype == both


def test_margins_and_thresholds_are_not_rounded_to_half_precision() -> None:
    # 65,504 - (-65,504) is infinite in half precision, and 0.1 is not a number there.
    far = torch.tensor([[65504.0, -65504.0]], dtype=torch.float16)
    assert margin_over(far, torch.tensor([1])).tolist() == [131008.0]
    for threshold in (0.1, 1e6):
        module = switch(threshold).half().bfloat16()
        assert module.threshold.dtype == torch.float32
        assert module.threshold == torch.tensor(threshold)
    old = torch.tensor([[0.0, 1.0]], dtype=torch.float16)
    assert switch(1e6).half()(old, far).tolist() == [[0, 1]]
    assert switch(0.5).to("meta").to_empty(device="cpu").threshold.dtype == torch.float32


def test_nothing_waits_for_the_device() -> None:
    # A meta tensor has no numbers that could be looked at.
    for classes in (None, [0, 2, 1]):
        assert switch(1.0, classes).to("meta")(OLD.to("meta"), NEW.to("meta")).shape == (5, 3)


def test_both_models_stay_in_evaluation_mode() -> None:
    old, new = (nn.Sequential(nn.Dropout(), nn.Linear(2, 2)) for _ in range(2))
    module = MarginSwitch(old, new, 1.0)
    nn.ModuleList([module]).train()
    assert not any(part.training for part in module.modules())


def test_without_a_number_the_old_model_answers() -> None:
    new = torch.tensor([[NAN, 1.0, 9.0], [9.0, 1.0, NAN], [INF, 1.0, 0.0], [0.0, INF, -INF]])
    old = torch.tensor([[9.0, 8.0, 7.0]]).repeat(4, 1)
    for threshold in (-INF, 1.0):
        assert switch(threshold)(old, new).tolist() == [[9, 8, 7], [9, 8, 7], *new[2:].tolist()]
    # Two infinite logits do not say which class is preferred.
    both = torch.tensor([[INF, INF, 0.0]])
    assert switch(1.0)(torch.tensor([[1.0, 2.0, 0.0]]), both).tolist() == [[1, 2, 0]]


def test_the_state_holds_models_threshold_and_classes(tmp_path: Path) -> None:
    first = MarginSwitch(nn.Linear(2, 3), nn.Linear(2, 4), 0.3, [3, 0, 1])
    torch.save(first.state_dict(), tmp_path / "switch.pt")
    second = MarginSwitch(nn.Linear(2, 3), nn.Linear(2, 4), -INF, [0, 1, 2])
    second.load_state_dict(torch.load(tmp_path / "switch.pt", weights_only=True))
    x = torch.randn(20, 2)
    assert torch.equal(first(x), second(x))
    with pytest.raises(ConfigurationError, match=r"the highest to 3"):
        second.choose(torch.zeros(1, 3), torch.zeros(1, 3))
    second.threshold.fill_(INF)
    assert torch.equal(second(x).argmax(1), torch.tensor([3, 0, 1])[second.old(x).argmax(1)])


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: switch(NAN), "`threshold=nan`"),
        (lambda: switch(True), "`threshold=True`"),
        (lambda: switch(1, {0: 1, 2: 0}), r"`classes=\{0: 1, 2: 0\}`"),
        (lambda: switch(1, [0, 0]), r"`classes=\[0, 0\]`"),
        (lambda: switch(1, [0, -1]), r"`classes=\[0, -1\]`"),
        (lambda: switch(1, []), r"`classes=\[\]`"),
        (lambda: switch(1, 3), "`classes=3`"),
        (lambda: MarginSwitch(len, Given(1), 1), "`old=<built-in function len>` is no module"),
        (lambda: MarginSwitch(Given(0), Given, 1), "`new=<class"),
        (lambda: switch(1)({"logits": OLD}, NEW), "`old`: .* found a dict"),
        (lambda: switch(1)(OLD, NEW[0]), r"`new`: .* found torch.float32 \[3\]"),
        (lambda: switch(1)(OLD[:, :1], NEW), r"`old`: .* \[5, 1\]"),
        (lambda: switch(1)(OLD[:, :2], NEW), "the old model has 2 classes, the new one 3, and it is not given"),
        (lambda: switch(1, [0, 1])(OLD, NEW), "3 classes, the new one 3, and it maps 2"),
        (lambda: switch(1, [0, 1, 4])(OLD, NEW), "it maps 3, the highest to 4"),
    ],
)
def test_what_cannot_be_a_switch_is_refused(call: Any, found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT"):
        call()


# ---------------------------------------------------------------------------------------------------------- exports


def mlp(classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, classes))


def exportable() -> list[MarginSwitch]:
    return [MarginSwitch(mlp(3, 0), mlp(3, 1), 0.3), MarginSwitch(mlp(3, 0), mlp(4, 1), 0.3, [1, 0, 3])]


SHOWN, FRESH = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (8, 53))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("which", [0, 1])
def test_a_trace_does_the_same_for_any_batch(which: int) -> None:
    module = exportable()[which]
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, SHOWN)
    old, new = module.side_by_side(module.old(FRESH), module.new(FRESH))
    assert 0 < int(module.is_served(old, new).sum()) < len(FRESH)
    assert torch.equal(traced(FRESH), module(FRESH))


class Branching(nn.Module):
    """Looks at its data: a trace would keep one branch only."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if bool(x.sum() > 0) else -x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_models_keep_their_branches_in_a_trace() -> None:
    module = MarginSwitch(torch.jit.script(Branching()), mlp(4, 0), 0.3)
    traced = torch.jit.trace(module, SHOWN)
    for x in (FRESH.abs(), -FRESH.abs()):
        assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize("which", [0, 1])
def test_an_exported_program_does_the_same_for_any_batch(which: int) -> None:
    module = exportable()[which]
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (SHOWN,), dynamic_shapes={"args": ({0: batch},)})
    assert torch.equal(program.module()(FRESH), module(FRESH))
    assert torch.equal(program.module()(FRESH[:1]), module(FRESH[:1]))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_does_the_same_for_any_batch(which: int, dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is not among the test dependencies")
    pytest.importorskip("onnxscript", reason="ONNX is not among the test dependencies")
    module, path = exportable()[which], str(tmp_path / "switch.onnx")
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["logits"], "dynamo": dynamo}
    if dynamo:
        names["dynamic_shapes"] = {"args": ({0: torch.export.Dim("batch")},)}
    else:
        names["dynamic_axes"] = {"x": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(module, (SHOWN,), path, **names)
    session = runtime.InferenceSession(path)
    for x in (FRESH, FRESH[:1]):
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x).detach())


# ------------------------------------------------------------------------------------------------------- thresholds


LABELS = torch.tensor([1, 1, 0, 0, 0, 1])
PREDICTED = torch.tensor([0, 0, 0, 0, 1, 1])
MARGINS = torch.tensor([4.0, 2.0, 3.0, 1.0, 5.0, 0.5])
AFTER = torch.stack([torch.zeros(6), MARGINS], 1)  # class 1: two repaired, two broken, one failing, one kept


def test_the_curve_has_the_smallest_threshold_for_each_number_of_broken_samples() -> None:
    choice = choose_threshold(PREDICTED, AFTER, LABELS, 0)
    assert [(p.threshold, p.counts, p.share) for p in choice.curve] == [
        (-INF, FlipCounts(kept=1, broken=2, repaired=2, failing=1), 1.0),
        (1.0, FlipCounts(kept=2, broken=1, repaired=2, failing=1), 5 / 6),
        (3.0, FlipCounts(kept=3, broken=0, repaired=1, failing=2), 3 / 6),
    ]
    assert (choice.threshold, choice.limit) == (3.0, "tolerance:0")
    assert "margin above 3, taken" in choice.render()
    assert "| **margin above 3, taken** | **1** | **0** |" in choice.to_markdown()


@pytest.mark.parametrize(
    ("limit", "threshold"),
    [
        (0, 3.0),
        (1, 1.0),
        (2, -INF),
        ("instance", 3.0),
        ("accuracy", -INF),
        ("tolerance:1", 1.0),
        ("tolerance:34%", 1.0),  # of three
        ("tolerance:33%", 3.0),
        (0.34, 1.0),
        (1.0, -INF),
    ],
)
def test_limits_are_counts_shares_or_gates(limit: Any, threshold: float) -> None:
    assert choose_threshold(PREDICTED, AFTER, LABELS, limit).threshold == threshold


def test_old_logits_and_predictions_give_the_same_also_with_other_classes() -> None:
    old = F.one_hot(PREDICTED, 2).float()
    assert choose_threshold(old, AFTER, LABELS, 1) == choose_threshold(PREDICTED, AFTER, LABELS, 1)
    # The new model numbers the same two classes 2 and 0.
    wider = torch.stack([AFTER[:, 1], torch.full((6,), -9.0), AFTER[:, 0]], 1)
    labels, classes = torch.tensor([2, 0])[LABELS], [2, 0]
    expected = choose_threshold(PREDICTED, AFTER, LABELS, 1)
    for given_old in (old, PREDICTED):
        assert choose_threshold(given_old, wider, labels, 1, classes=classes) == expected


def test_a_new_output_without_numbers_is_never_served() -> None:
    new = AFTER.clone()
    new[2] = NAN
    point = choose_threshold(PREDICTED, new, LABELS, 5).chosen
    assert (point.threshold, point.counts, point.share) == (-INF, FlipCounts(2, 1, 2, 1), 5 / 6)


def test_a_long_curve_is_thinned_and_keeps_its_ends_and_the_choice() -> None:
    labels = torch.zeros(1000, dtype=torch.int64)
    new = torch.stack([torch.zeros(1000), torch.arange(1.0, 1001)], 1)
    choice = choose_threshold(labels, new, labels, 3)
    assert choice.threshold == 997
    assert len(choice.curve) <= 50
    assert {-INF, 997.0, 1000.0} <= {point.threshold for point in choice.curve}
    assert choice.curve[-1].counts.broken == 0


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"old": PREDICTED[:5]}, r"`old` is \[5\], `labels` has 6"),
        ({"new": AFTER[:5]}, r"`new` is \[5, 2\], `labels` has 6"),
        ({"new": AFTER.tolist()}, "`new` is a list"),
        ({"new": PREDICTED}, r"`new`: the switch needs logits .* torch.int64 \[6\]"),
        ({"old": PREDICTED.float()}, r"`old`: the switch needs logits .* torch.float32 \[6\]"),
        ({"labels": LABELS + 0.5}, "multiclass needs whole labels"),
        ({"old": PREDICTED[:0], "new": AFTER[:0], "labels": LABELS[:0]}, "`labels` has 0 samples"),
        ({"limit": "tolerance"}, "is no gate"),
        ({"limit": -1}, "`limit=-1`"),
        ({"points": 2}, "`points=2`"),
        ({"classes": [0]}, r"`classes` has 1, `old` holds 0\.\.\.1"),
        ({"old": AFTER, "classes": [0]}, "it maps 1"),
        ({"old": PREDICTED + 2}, r"`old` predicts classes 2\.\.\.3, `new` has logits of 2"),
        ({"old": PREDICTED - 1}, r"`old` predicts classes -1\.\.\.0, `new` has logits of 2"),
        ({"classes": [0, 5]}, r"`old` predicts classes 0\.\.\.5, `new` has logits of 2"),
    ],
)
def test_what_gives_no_threshold_is_refused(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT"):
        choose_threshold(**{"old": PREDICTED, "new": AFTER, "labels": LABELS, "limit": 0, **arguments})


logits = st.lists(st.tuples(*[st.integers(-3, 3)] * 6, st.integers(0, 2)), min_size=1, max_size=25)


def split(rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.tensor(rows)
    return table[:, :3].float() / 2, table[:, 3:6].float() / 2, table[:, 6]


def served_counts(threshold: float, old: Tensor, new: Tensor, labels: Tensor) -> tuple[FlipCounts, float]:
    """What a real switch does, counted sample by sample."""
    module = switch(threshold)
    before, after = old.argmax(1) == labels, module(old, new).argmax(1) == labels
    masks = (before & after, before & ~after, ~before & after, ~before & ~after)
    return FlipCounts(*(int(mask.sum()) for mask in masks)), float(module.is_served(old, new).float().mean())


@settings(max_examples=30, deadline=None)
@given(logits, st.lists(st.floats(-1, 7, width=32), min_size=2, max_size=6))
def test_a_higher_threshold_never_breaks_repairs_or_answers_more(rows: Any, thresholds: list[float]) -> None:
    # A sample that the new model answers at a threshold it answers at every lower one; the others are as they were.
    found = [served_counts(t, *split(rows)) for t in sorted(thresholds)]
    for (low, low_share), (high, high_share) in pairwise(found):
        assert high.broken <= low.broken
        assert high.repaired <= low.repaired
        assert high_share <= low_share
        assert high.kept >= low.kept
        assert high.failing >= low.failing


@settings(max_examples=30, deadline=None)
@given(logits)
def test_the_ends_are_the_two_models(rows: Any) -> None:
    old, new, _ = split(rows)
    assert torch.equal(switch(INF)(old, new).argmax(1), old.argmax(1))
    for below in (-INF, -1e-30):
        assert torch.equal(switch(below)(old, new), new)


@settings(max_examples=40, deadline=None)
@given(logits, st.integers(0, 4))
def test_the_chosen_threshold_is_the_smallest_and_counts_are_those_of_the_switch(rows: Any, limit: int) -> None:
    old, new, labels = split(rows)
    choice = choose_threshold(old, new, labels, limit, points=100)
    for point in choice.curve:
        counts, share = served_counts(point.threshold, old, new, labels)
        assert counts == point.counts
        assert share == pytest.approx(point.share)
    assert choice.chosen.counts.broken <= limit
    if choice.threshold > -INF:
        lower = torch.nextafter(torch.tensor(choice.threshold), torch.tensor(-INF)).item()
        assert served_counts(lower, old, new, labels)[0].broken > limit


# ---------------------------------------------------------------------------------------------------- real networks


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


@cache
def updated() -> tuple[nn.Module, nn.Module]:
    """A network, and another that was trained on twice as many images."""

    def trained(n: int) -> nn.Module:
        x, y = (part[:n] for part in digits())
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model.requires_grad_(False)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trained(200), trained(400)


def test_on_digits_regressions_become_fewer_within_the_limit() -> None:
    old, new = updated()
    x, y = digits()
    x_aside, y_aside, x_test, y_test = x[400:1000], y[400:1000], x[1000:], y[1000:]
    choice = choose_threshold(old(x_aside), new(x_aside), y_aside, "tolerance:0.5%")
    module = MarginSwitch(old, new, choice.threshold)
    sources = [
        TensorSource(x_aside, y_aside, split="calibration"),
        TensorSource(x_test, y_test, split="test", batch_size=100),
    ]
    report = report_switch(module, sources, runs=2)
    aside, test = report.splits
    assert aside.new.passed == int((old(x_aside).argmax(1) == y_aside).sum())
    assert aside.new == choice.curve[0].counts
    assert aside.switch == choice.chosen.counts
    assert aside.served == round(choice.chosen.share * 600)
    assert aside.switch.broken <= 0.005 * aside.switch.passed < aside.new.broken
    assert test.switch.broken < test.new.broken
    assert 0 < test.switch.repaired <= test.new.repaired
    assert test.new.n == test.switch.n == 797


def test_the_report_counts_and_times_all_three() -> None:
    source = TensorSource((F.one_hot(PREDICTED, 2).float(), AFTER), LABELS, split="test", batch_size=4)
    report = report_switch(switch(1.0), [source], runs=3)
    (test,) = report.splits
    assert test.new == FlipCounts(kept=1, broken=2, repaired=2, failing=1)
    assert test.switch == FlipCounts(kept=2, broken=1, repaired=2, failing=1)
    assert test.served == 5
    timing = report.timing
    assert (timing.samples, timing.device, timing.runs) == (4, "cpu", 3)
    assert min(timing.old, timing.new, timing.switch) > 0
    assert Timing(4, "cpu", 3, old=0.1, new=0.2, switch=0.5).ratio == 2.5
    assert re.search(r"^right +3 +3 +4$", report.render(), re.MULTILINE)
    assert re.search(r"^broken \(was right, now wrong\) +2 +1$", report.render(), re.MULTILINE)
    assert "| answered by the new model |  |  | 83.33 % |" in report.to_markdown()
    assert "forward pass" in report.render()
    (batch, _) = TensorSource((AFTER, AFTER), LABELS, split="timed", batch_size=5)
    assert report_switch(switch(1.0), [source], batch=batch, runs=1).timing.samples == 5


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"switch": Given(0)}, "`switch=Given"),
        ({"sources": []}, "`sources` hold no sample"),
        ({"runs": 0}, "`runs=0`"),
    ],
)
def test_what_gives_no_report_is_refused(arguments: dict[str, Any], found: str) -> None:
    source = TensorSource((AFTER, AFTER), LABELS, split="test")
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT"):
        report_switch(**{"switch": switch(1.0), "sources": [source], **arguments})


# -------------------------------------------------------------------------------------------------------- Lightning


class Plain(LightningModule):
    def __init__(self, net: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters("classes")
        self.net = net
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.hooks: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def shared_step(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x).argmax(1) == y).float().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.shared_step(batch), batch_size=len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)

    def on_test_epoch_end(self) -> None:
        self.hooks.append("test_epoch_end")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Inherited(Plain):
    """Calls its parent's steps; in training mode it would answer otherwise."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(nn.Sequential(nn.Dropout(), net))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)


class GoesPast(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def quiet(**arguments: Any) -> Trainer:
    off: dict[str, Any] = {f"enable_{what}": False for what in ("progress_bar", "model_summary", "checkpointing")}
    return Trainer(accelerator="cpu", logger=False, **off, **arguments)


def loader() -> DataLoader[Any]:
    x, y = digits()
    return DataLoader(TensorDataset(x[1000:], y[1000:]), 200)


quietly = pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)


@quietly
def test_a_trainer_tests_validates_and_predicts_with_the_switch() -> None:
    old, new = updated()
    x, y = digits()
    expected = MarginSwitch(old, new, 1.5)(x[1000:])
    accuracy = (expected.argmax(1) == y[1000:]).float().mean().item()
    mine = Inherited(new)
    served = SwitchedModule(old, mine, 1.5)
    assert isinstance(served, Inherited)
    assert served.hparams == {"classes": 10}
    trainer = quiet()
    (tested,) = trainer.test(served, loader(), verbose=False)
    assert tested["accuracy"] == pytest.approx(accuracy)
    assert served.hooks == ["test_epoch_end"]
    (validated,) = trainer.validate(served, loader(), verbose=False)
    assert validated["val"] == pytest.approx(accuracy)
    predicted = trainer.predict(served, loader())
    torch.testing.assert_close(torch.cat(predicted), expected)
    # The user's own module is as it was.
    assert mine.training
    assert not mine.hooks
    assert "margin_switch" not in dict(mine.named_modules())
    with pytest.raises(ConfigurationError, match=r"cannot be trained[\s\S]*HINT"):
        quiet(max_epochs=1).fit(served, loader())


@quietly
def test_a_checkpoint_of_a_switch_is_read_back(tmp_path: Path) -> None:
    old, new = updated()
    served, path = SwitchedModule(Plain(old), Plain(new), 1.5, classes=list(range(10))), tmp_path / "served.ckpt"
    trainer = quiet()
    trainer.predict(served, loader())
    trainer.save_checkpoint(path)

    def fresh() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    loaded = SwitchedModule.load_from_checkpoint(path, old=Plain(fresh()), new=Plain(fresh()))
    x = digits()[0]
    assert torch.equal(loaded(x), served(x))
    assert loaded.margin_switch.threshold == 1.5
    # An instance with other weights and another threshold, by the Trainer.
    other = SwitchedModule(Plain(fresh()), Plain(fresh()), INF, classes=list(range(10)))
    safe = {"weights_only": True} if "weights_only" in inspect.signature(trainer.test).parameters else {}
    (tested,) = trainer.test(other, loader(), ckpt_path=path, verbose=False, **safe)
    assert tested["accuracy"] == pytest.approx(trainer.test(served, loader(), verbose=False)[0]["accuracy"])
    # The new module alone, by its own class.
    with pytest.warns(UserWarning, match="not in the model state dict"):
        alone = Plain.load_from_checkpoint(path, net=fresh(), strict=False, weights_only=True)
    assert torch.equal(alone.eval()(x), new(x))
    trainer = quiet()
    trainer.predict(alone, loader())
    trainer.save_checkpoint(tmp_path / "alone.ckpt")
    with pytest.raises(ConfigurationError, match=r"without a switch[\s\S]*HINT"):
        SwitchedModule.load_from_checkpoint(tmp_path / "alone.ckpt", old=Plain(fresh()), new=Plain(fresh()))


@quietly
def test_steps_that_go_past_the_switch_are_refused() -> None:
    old, new = updated()
    with pytest.raises(ConfigurationError, match=r"`test_step` never called `self\(...\)`[\s\S]*HINT"):
        quiet().test(SwitchedModule(old, GoesPast(new), 1.5), loader(), verbose=False)
    # What the message says to do.
    served = copy.deepcopy(GoesPast(new))
    served.net = MarginSwitch(old, new, INF)
    (tested,) = quiet().test(served, loader(), verbose=False)
    x, y = digits()
    assert tested["accuracy"] == pytest.approx((old(x[1000:]).argmax(1) == y[1000:]).float().mean().item())


def test_a_switched_module_can_be_copied_pickled_exported_and_put_behind_another() -> None:
    old, new = updated()
    served, x = SwitchedModule(old, Plain(new), 1.5), digits()[0]
    assert not served.train().training
    for twin in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        assert type(twin) is type(served)
        assert torch.equal(twin(x), served(x))
    shapes = {"args": ({0: torch.export.Dim("batch")},)}
    program = torch.export.export(served, (x[:8],), dynamic_shapes=shapes, strict=False)
    assert torch.equal(program.module()(x), served(x))
    again = SwitchedModule(served, Plain(old), -INF)
    assert torch.equal(again(x), old(x))
    for argument, found in ((served, "is a `SwitchedModule` itself"), (new, "is no LightningModule")):
        with pytest.raises(ConfigurationError, match=rf"`new[\s\S]*{found}[\s\S]*HINT"):
            SwitchedModule(old, argument, 1.0)
