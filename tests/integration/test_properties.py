"""For any small problem: what the gate has accepted breaks nothing, and the live model is never
touched.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from lightning_nrl import ParticleSwarm, SearchOptions, Settings, TensorSource, repair_module
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.pipeline.repair_module import Outcome
from lightning_nrl.search import Fitness

pytestmark = pytest.mark.filterwarnings("ignore:not repaired")

FITNESS = [
    Fitness(),
    Fitness("eq1"),
    Fitness("eq2", alpha=0.0),
    Fitness("eq2", perfect_intact=True),
]


def mlp(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, classes))


def cnn(width: int, classes: int) -> nn.Sequential:
    norm = nn.BatchNorm2d(width)
    nn.init.normal_(norm.running_mean)
    convolutions = (
        nn.Conv2d(1, width, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.Conv2d(width, width, 2, stride=2),
        nn.Tanh(),
    )
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Dropout(), nn.Linear(4 * width, classes))


@st.composite
def problems(draw: st.DrawFn) -> tuple[nn.Sequential, list[TensorSource], Settings]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    classes, width = draw(st.integers(2, 4)), draw(st.integers(2, 6))
    model = draw(st.sampled_from([mlp, cnn]))(width, classes).to(
        draw(st.sampled_from([torch.float32, torch.bfloat16]))
    )
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=2))
    dtype = next(model.parameters()).dtype
    splits = []
    for split, n in zip("ab", sizes, strict=False):
        inputs, labels = torch.randn(n, 1, 4, 4, dtype=dtype), torch.randint(classes, (n,))
        splits.append(
            TensorSource(inputs, labels, split, passed=True, failed=split == "a", batch_size=7)
        )
    layers = [str(i) for i, layer in enumerate(model) if isinstance(layer, (nn.Linear, nn.Conv2d))]
    chosen = Settings(
        layer=draw(st.sampled_from(["auto", layers, *layers])),
        search=SearchOptions(
            fitness=draw(st.sampled_from(FITNESS)),
            localizer=draw(
                st.sampled_from([AllWeights(), NeuRecoverLite(), NeuRecoverLite(n_weights=3)])
            ),
            n_passed=draw(st.none() | st.integers(1, 5)),
        ),
        method=ParticleSwarm(
            particles=8, iterations=8, start=draw(st.sampled_from(["half", "local", "paper"]))
        ),
        seed=draw(st.integers(0, 2**16)),
    )
    return model.eval(), splits, chosen


@torch.no_grad()
def passes(model: nn.Module, splits: list[TensorSource], outcome: Outcome | None = None) -> Tensor:
    """By a forward pass of its own, in the batches in which the model is deployed."""
    parameters = {} if outcome is None else dict(outcome.parameters or {})
    batches = [(batch.args, batch.target) for split in splits for batch in split]
    return torch.cat(
        [functional_call(model, parameters, args).argmax(1) == labels for args, labels in batches]
    )


@settings(max_examples=25, deadline=None)
@given(problems())
def test_an_accepted_repair_breaks_nothing_and_the_model_is_never_touched(problem):
    model, splits, chosen = problem
    before, state = passes(model, splits), copy.deepcopy(model.state_dict())
    outcome = repair_module(model, splits, chosen)
    after = passes(model, splits, outcome)
    assert not (before & ~after).any()
    assert (outcome.parameters is not None) == (outcome.report.status == "repaired")
    assert sum(split.repaired for split in outcome.report.splits) == int((~before & after).sum())
    assert (outcome.parameters is None) or (~before & after).any()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert not any(module.training for module in model.modules())
