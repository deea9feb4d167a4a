"""Many runs: each is what a single repair is, and its counts are those of the deployed model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from options import with_options
from ranks import on_ranks
from torch import Tensor, nn
from toy_repairs import blobs, known, quick, right, trained, unseen

from lightning_nrl import (
    ConfigurationError,
    Gate,
    Grid,
    ParticleSwarm,
    Settings,
    Target,
    TensorSource,
    repair_module,
)
from lightning_nrl.data import Batch
from lightning_nrl.errors import DataWarning, RepairError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.records import hash_tensors
from lightning_nrl.search import RandomStream, SearchOrigin
from lightning_nrl.study import Run, SweepResult, sweep_module

GRID = Grid(
    fitness=["lexicographic", "eq1", "eq2"],
    alpha=8,
    perfect_intact=[False, True],
    n_weights=[6, 12],
    n_passed=[30, None],
    patience=1,
)
COUNTED = (
    "n",
    "targeted",
    "repaired_in_target",
    "passed_in_target",
    "broken_in_target",
    "repaired",
    "broken",
)


def calibration() -> list[TensorSource]:
    return [TensorSource(*blobs(50, 1.0, 7), split="val", batch_size=16)]


def run(model: nn.Module | Evaluator, settings: Any = GRID, **arguments: Any) -> SweepResult:
    """A sweep of the blobs; unseen data are read in batches of another size than known."""
    given = {
        "base": quick(),
        "seeds": 2,
        "unseen": unseen(),
        "calibration": calibration(),
    }
    return sweep_module(model, known(batch_size=48), settings, **{**given, **arguments})


def check_alone(model: nn.Module, result: SweepResult, chosen: Run, **arguments: Any) -> None:
    """A run is, bit for bit and count by count, the repair with the same arguments."""
    how = {
        **result.arguments(chosen),
        **arguments,
        "gate": Gate.tolerance(10**6),
    }  # whatever it breaks
    others = {"unseen": unseen(), "calibration": calibration()}
    outcome = repair_module(model, known(batch_size=48), Settings(**with_options(how)), **others)
    report, state = outcome.report, result.state(chosen)
    if not chosen.known.repaired_in_target:
        assert report.status == "not repaired"
        return
    assert (chosen.value, chosen.iterations) == (report.search.fitness, report.search.iterations)
    assert chosen.patched == report.search.history["patched"][-1]
    assert chosen.intact == report.search.history["intact"][-1]
    for name, value in outcome.parameters.items():
        assert torch.equal(state[name], value)
    for role in ("known", "calibration", "unseen"):
        splits = [split for split in report.splits if split.role == role]
        for name in COUNTED:
            assert sum(getattr(split, name) for split in splits) == getattr(
                chosen.counts(role), name
            )


def test_each_run_is_what_a_single_repair_finds_and_counts():
    model = trained()
    result = run(model)
    assert len(result.runs) == 2 * (4 + 2 * 2 * 4)
    assert sum(chosen.known.repaired_in_target > 0 for chosen in result.runs) > 20
    assert len({chosen.iterations for chosen in result.runs}) > 2
    for chosen in result.runs[::4]:
        check_alone(model, result, chosen)


def deep() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


class Twice(nn.Module):
    """Calls its layer twice, so that nothing can be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.layer(x))))


@pytest.mark.filterwarnings("ignore:`layer`. layer 'layer' is called 2 times")
@pytest.mark.parametrize(
    ("make", "shared"),
    [
        (
            deep,
            {
                "layer": "3",
                "localizer": NeuRecoverLite(n_weights=9, include_bias=True),
                "target": Target.label(0),
            },
        ),
        (deep, {"layer": ["0", "5"], "localizer": AllWeights(), "target": Target.label(0)}),
        (deep, {"layer": "0", "localizer": NeuRecoverLite(), "target": Target.label(0)}),
        (Twice, {"layer": "layer"}),
        (None, {"importance": "focal"}),
        (None, {"set_aside": {"new": [3, 7, 30]}}),
        (None, {"set_aside": "doubtful"}),
    ],
)
def test_any_layers_and_any_failures_are_swept(make, shared):
    model = trained() if make is None else trained(make)
    result = run(
        model, Grid(fitness=["eq1", "lexicographic"], n_passed=[None, 50]), base=quick(**shared)
    )
    assert any(chosen.known.repaired_in_target for chosen in result.runs)
    for chosen in result.runs[::3]:
        check_alone(
            model, result, chosen, **{name: shared[name] for name in shared if name != "localizer"}
        )


def test_counts_are_those_of_the_model_with_the_weights_written_into_it():
    model, random = trained(), torch.get_rng_state()
    original = hash_tensors(model.state_dict())
    sources = {"known": known(), "calibration": calibration(), "unseen": unseen()}
    result = run(model, Grid(fitness=["eq1", "eq2"], alpha=[1, 8], n_weights=12), seeds=4)
    assert hash_tensors(model.state_dict()) == original
    assert torch.equal(torch.get_rng_state(), random)
    before = {
        role: torch.cat([right(model, source) for source in data]) for role, data in sources.items()
    }
    for chosen in result.runs:
        written = copy.deepcopy(model)
        result.write(written, chosen)
        for role, data in sources.items():
            now = torch.cat([right(written, source) for source in data])
            found = int((now & ~before[role]).sum()), int((~now & before[role]).sum())
            assert (chosen.counts(role).repaired, chosen.counts(role).broken) == found
            assert chosen.counts(role).accuracy_after == pytest.approx(now.double().mean().item())


def test_known_samples_count_for_nothing_in_unseen_data():
    model = trained()
    (later,) = unseen()
    x, y = (torch.cat(parts) for parts in zip(blobs(60, 1.5, 1), blobs(80, 1.5, 2), strict=True))
    with pytest.warns(DataWarning, match="60 of the 140 samples of `later` are known"):
        leaky = run(model, unseen=[replace(later, inputs=x, targets=y)])
    for chosen, clean in zip(leaky.runs, run(model).runs, strict=True):
        assert chosen.counts("unseen") == clean.counts("unseen")


def test_a_setting_that_leaves_no_weight_has_rows_of_its_own():
    (one, *_) = run(trained(), {"n_g": 36}).runs
    found = (one.n_localized, one.iterations, one.value, one.changed, one.patched, one.intact)
    assert found == (0, 0, None, False, 0, 164)
    assert (one.known.repaired, one.known.broken, one.known.accuracy_after) == (
        0,
        0,
        one.known.accuracy_before,
    )


def timeless(result: SweepResult) -> SweepResult:
    return replace(result, runs=tuple(replace(one, seconds=0.0) for one in result.runs))


def test_data_are_read_once_for_all_runs_of_the_last_layer():
    reads = []

    class Read(TensorSource):
        def __iter__(self) -> Iterator[Batch]:
            reads.append(self.split)
            return super().__iter__()

    later = [Read(*blobs(80, 1.5, 2), split="later")]
    run(trained(), Grid(fitness="eq1", alpha=[4, 5, 6]), unseen=later)
    assert len(reads) == 2  # to evaluate the model, and to record its last layer


class Noting(ParticleSwarm):
    """Notes the seeds of its searches, and fails in some of them."""

    seeds: ClassVar[list[int]] = []
    fails: ClassVar[Callable[[int], BaseException | None]]

    def init(self, origin: SearchOrigin, random: RandomStream) -> Any:
        seed = random.generator.initial_seed()
        self.seeds.append(seed)
        error = Noting.fails(seed)
        if error is not None:
            raise error
        return super().init(origin, random)


NOTING = quick(method=Noting(particles=12, iterations=12))


def test_a_second_call_makes_only_what_is_missing(tmp_path):
    model, folder, made = trained(), tmp_path / "sweep", Noting.seeds
    made.clear()
    Noting.fails = lambda seed: KeyboardInterrupt() if len(made) > 4 else None
    grid = Grid(fitness="eq1", alpha=[4, 5, 6])
    with pytest.raises(KeyboardInterrupt):
        run(model, grid, dirpath=folder, base=NOTING)
    assert len(SweepResult.from_csv(folder / "sweep.csv").runs) == 4
    # A file that was cut short is made again.
    (folder / "runs-0.pt").write_bytes(b"half a file")
    (folder / "runs-1.pt").mkdir()
    Noting.fails = lambda seed: None
    made.clear()
    with pytest.warns(DataWarning, match=r"runs-.\.pt cannot be used .*; its runs are made again"):
        result = run(model, grid, dirpath=folder, base=NOTING)
    (folder / "runs-0.pt").unlink()
    (folder / "runs-1.pt").rmdir()
    assert made == [0, 1]
    assert timeless(result) == timeless(run(model, grid, base=NOTING))
    made.clear()
    renamed = {"alpha": 6, "fitness": "eq1", "name": "renamed"}
    again = run(model, renamed, seeds=3, dirpath=folder, base=NOTING)
    assert made == [2]
    assert [one.setting for one in again.runs] == ["renamed"] * 3
    for old, new in zip(result.runs[4:], again.runs, strict=False):
        assert torch.equal(result.state(old)["2.weight"], again.state(new)["2.weight"])
    # Another model, other data and another target are other runs.
    for others in (
        {"model": trained(seed=1)},
        {"unseen": []},
        {"base": replace(NOTING, target=Target.label(0))},
    ):
        made.clear()
        settings = {"alpha": 6, "fitness": "eq1"}
        arguments = {"model": model, "settings": settings, "dirpath": folder, "base": NOTING}
        run(**{**arguments, **others})
        assert made == [0, 1]


def test_an_observer_is_told_how_much_of_the_work_is_done():
    stages, told = list[str](), list[float]()

    def search(done: int, total: int, *_: Any) -> None:
        told.append(done / total)

    observer = SimpleNamespace(
        stage=lambda name: nullcontext(stages.append(name)),
        search=search,
        expect=lambda seconds, most: None,
    )
    run(trained(), Grid(fitness="eq1", alpha=[4, 5, 6]), observer=observer)
    assert stages == ["collect", "unseen", "unseen", "sweep", "localize", "localize"]
    assert told == sorted(told)
    assert told[-1] == 1
    assert any(0.2 < share < 0.5 for share in told)


def test_a_rank_that_fails_ends_the_sweep_on_all():
    Noting.fails = lambda seed: RuntimeError("broken") if seed == 1 else None

    def work(collective: Any) -> str:
        with pytest.raises((RuntimeError, RepairError)) as caught:
            run(Evaluator(trained(), collective=collective), {"alpha": 4}, base=NOTING)
        return str(caught.value).partition("\n")[0]

    assert sorted(on_ranks(2, work)) == [
        "another rank could not make its runs of the sweep. RuntimeError: broken",
        "broken",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"base": quick(target=Target.label(0) & ~Target.label(0))},
            "no sample fails in the target",
        ),
        ({"base": 3}, "`settings=3` is no Settings"),
        ({"base": Settings(layer="3")}, "`layer='3'` is not in the model"),
        (
            {"base": quick(protected={"train": [1]})},
            "`protected`: the table of a sweep has no column for it",
        ),
        ({"seeds": 0}, "`seeds=0` names no seed"),
        ({"unseen": known()}, "give each split its own name"),
    ],
)
def test_what_cannot_be_swept_is_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        run(trained(), **arguments)


def test_data_that_are_shared_out_over_ranks_are_refused(tmp_path):
    class Half(TensorSource):
        @property
        def positions(self) -> Tensor:
            return self.index[::2]

    train, new = known()
    half = Half(train.inputs, train.targets, "train", passed=True)
    with pytest.raises(ConfigurationError, match="`train` data are split: this rank has 60 of 120"):
        sweep_module(trained(), [half, new], {"alpha": 4})
    (tmp_path / "file").write_text("")
    for name in ("file", "a\0b", 300 * "a"):
        with pytest.raises(ConfigurationError, match="is no folder and cannot be made one"):
            run(trained(), dirpath=tmp_path / name)
