"""What is promised of a GPU, checked on a real card in ten minutes; a table at the end, and an exit status.

python tests/gpu_check.py                     # 0: all holds, 1: something does not, 2: there is no card
python tests/gpu_check.py --device strict     # every check on the stand-in for CUDA, without a card and without times
python tests/gpu_check.py --only waits memory
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PATHS = [str(ROOT), str(TESTS), str(TESTS / "device"), str(TESTS / "scoring"), str(TESTS / "integration")]

NO_CARD = """\
There is no CUDA device here, so nothing was checked (torch {version}).
On a machine with a card: install this package with a CUDA build of torch, then `python tests/gpu_check.py`.
Without one: `python tests/gpu_check.py --device strict` goes through the same checks on a stand-in."""
HEAD = (4289, 64, 10)
"""Samples, features, classes of the head that is timed."""


@dataclass(frozen=True)
class Row:
    """One line of the table; `holds` is None where there is nothing to hold."""

    check: str
    found: str
    promised: str = ""
    holds: bool | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "strict"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS), default=tuple(CHECKS))
    options = parser.parse_args()
    sys.path[:0] = [path for path in PATHS if path not in sys.path]
    if options.device == "strict":
        from strict_build import reason_not_to

        if "torch" not in sys.modules:
            import strict_cuda  # noqa: F401
        elif reason_not_to():
            print(reason_not_to())
            return 2
    import torch

    if not torch.cuda.is_available():
        print(NO_CARD.format(version=torch.__version__))
        return 2
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name in options.only:
        began = time.perf_counter()
        try:
            rows += CHECKS[name](options.device == "strict")
        except Exception as error:
            rows.append(
                Row(name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:90], "no error", False)
            )
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print_table(rows)
    failed = [row for row in rows if row.holds is False]
    print(f"\n{len(failed)} of {sum(row.holds is not None for row in rows)} promises do not hold.")
    return 1 if failed else 0


def print_table(rows: list[Row]) -> None:
    marks = {None: "", True: "yes", False: "NO"}
    cells = [("check", "found", "promised", "holds")]
    cells += [(row.check, row.found, row.promised, marks[row.holds]) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    for number, line in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))


def card(strict: bool) -> list[Row]:
    """What is checked."""
    import torch

    from lightning_nrl.evaluation import Evaluator

    free, total = torch.cuda.mem_get_info()
    return [
        Row("torch", torch.__version__),
        Row("device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB"),
        Row("free", f"{free / 2**30:.1f} GiB"),
        Row("judged in", str(Evaluator(torch.nn.Linear(2, 2).cuda()).precision)),
    ]


def exactness(strict: bool) -> list[Row]:
    """Scores are what the module gives candidate by candidate; repairs break nothing, counted by a pass of its own."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # as exact as a CPU
    from scoring_networks import REPLAYED, make_problem

    from lightning_nrl._model.layers import find_layers
    from lightning_nrl._scoring import make_scorer
    from lightning_nrl.evaluation import Evaluator

    n, differing, names = 60, 0, ["head", "middle linear", "conv2d", "residual, first", "branch run first"]
    for name in names:
        problem = make_problem(REPLAYED[name], n=n)
        moved = replace(problem, model=problem.model.cuda(), data=tuple(x.cuda() for x in problem.data))
        problem = replace(moved, space=find_layers(moved.model, REPLAYED[name].layer), target=moved.target.cuda())
        where, values = problem.candidates(9, 6)
        failed = torch.arange(n) % 3 == 0
        scorer = make_scorer(problem.recording(n), where, failed, ~failed, Evaluator(problem.model))
        scores = scorer(values.cuda().unsqueeze(0))
        right = problem.oracle(where, values.cuda()).argmax(2) == problem.target
        for rows, found in ((failed.cuda(), scores.patched), (~failed.cuda(), scores.intact)):
            differing += int((right[:, rows].sum(1) != found[0]).sum())
    rows = [
        Row("scores of 45 candidates, 5 networks", f"{differing} counts differ from the module's", "0", differing == 0)
    ]
    return [*rows, *decisions(strict)]


def decisions(strict: bool) -> list[Row]:
    """Each method against the same repair on the CPU, whose random numbers are others on a real card."""
    import torch
    from device_repairs import CASES, LONG_CASES, counted, sources
    from toy_repairs import trained

    from lightning_nrl import repair_module

    rows = []
    for name, (make, settings) in (CASES if strict else {**CASES, **LONG_CASES}).items():
        model = trained(make).cuda()
        with torch.no_grad():
            before = [model.eval()(s.inputs.cuda()).argmax(1) == s.targets.cuda() for s in sources()]
        there, here = repair_module(model, sources("cuda"), settings), repair_module(trained(make), sources(), settings)
        there.write(model)
        with torch.no_grad():
            after = [model.eval()(s.inputs.cuda()).argmax(1) == s.targets.cuda() for s in sources()]
        broken = sum(int((was & ~now).sum()) for was, now in zip(before, after, strict=True))
        repaired, alone = (sum(s.repaired for s in one.report.splits) for one in (there, here))
        same = there.report.status == here.report.status and (not strict or counted(there) == counted(here))
        found = f"{there.report.status}, {repaired} repaired, {broken} broken (on the CPU {alone} repaired)"
        rows.append(Row(name, found, "same decision, 0 broken", same and broken == 0))
    return rows


def waits(strict: bool) -> list[Row]:
    """Between two looks, ten iterations apart, and within a step of training nothing may wait."""
    import pytest
    import test_promises as promises

    rows = []
    work: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
        (name, lambda patch, name=name: promises.test_a_search_waits_once_in_ten_iterations(name, patch))
        for name in promises.SEARCHES
    ]
    work.append(("many swarms", promises.test_many_swarms_wait_once_in_ten_iterations))
    work.append(("a step of training", promises.test_a_step_of_training_never_waits))
    work.append(("a masked step", lambda patch: promises.test_a_step_that_moves_some_weights_never_waits()))
    for name, check in work:
        with pytest.MonkeyPatch.context() as patch:
            try:
                check(patch)
                found, holds = "none between two looks", True
            except (RuntimeError, AssertionError) as error:
                found, holds = str(error).partition("\n")[0][:80], False
        rows.append(Row(f"waits: {name}", found, "0", holds))
    return rows


def speed(strict: bool) -> list[Row]:
    """Microseconds an iteration of a swarm of 100 particles; of the stand-in its launches."""
    import torch
    from device_repairs import Conv
    from torch import nn

    from lightning_nrl import ParticleSwarm, SearchOptions, Settings, TensorSource, repair_module
    from lightning_nrl.localization import NeuRecoverLite
    from lightning_nrl.methods import local_search

    n, features, classes = (400, 64, 10) if strict else HEAD
    generator = torch.Generator().manual_seed(0)
    made = {
        f"head {features} -> {classes}": (
            nn.Linear(features, classes),
            torch.randn(n, features, generator=generator),
            "auto",
        ),
        "convolution, small": (Conv(), torch.randn(n, 4, generator=generator), "first"),
    }
    rows = []
    for name, (model, x, layer) in made.items():
        model = model.eval().cuda()
        with torch.no_grad():
            y = model(x.cuda()).argmax(1).cpu()
        moved = x + 0.05 * torch.randn(x.shape, generator=generator)
        data = TensorSource(moved, y, "all", passed=True, failed=True, batch_size=1024, device="cuda")
        seconds, launches = [], []
        for iterations in (20, 30) if strict else (100, 500):
            with timed_search(local_search, strict) as found:
                method = ParticleSwarm(particles=100, iterations=iterations, patience=10_000)
                search = SearchOptions(localizer=NeuRecoverLite(n_weights=50))
                repair_module(model, [data], Settings(method=method, layer=layer, search=search))
            seconds.append(found[0])
            launches.append(found[1])
        made_more = 10 if strict else 400
        each = (seconds[1] - seconds[0]) / made_more * 1e6
        text = f"{(launches[1] - launches[0]) / made_more:.0f} launches" if strict else f"{each:,.0f} us"
        rows.append(Row(f"an iteration: {name}, {n:,} samples", text, "<= 300" if strict else "<= 10,000 us"))
        holds = (launches[1] - launches[0]) / made_more <= 300 if strict else each <= 10_000
        rows[-1] = replace(rows[-1], holds=holds)
    return rows


@contextmanager
def timed_search(module: Any, strict: bool) -> Iterator[list[float]]:
    """Gives the seconds that the next search takes and the launches that it makes."""
    import torch

    real, found = module.search, [0.0, 0.0]

    def search(*args: Any, **rest: Any) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        if strict:
            with sys.modules["strict_cuda"].watch() as seen:
                result = real(*args, **rest)
            found[1] = seen.n_launches
        else:
            result = real(*args, **rest)
        torch.cuda.synchronize()
        found[0] = time.perf_counter() - began
        return result

    module.search = search
    try:
        yield found
    finally:
        module.search = real


def memory(strict: bool) -> list[Row]:
    """Blocks do not shrink with the data; a budget is kept; memory that runs out costs nothing."""
    import pytest
    import test_promises as promises
    import torch
    from device_repairs import Conv, counted, sources
    from toy_repairs import quick, trained

    from lightning_nrl import ParticleSwarm, repair_module

    rows = []
    for name, n in (("convolution", 1500), ("head", 2000)) if strict else (("convolution", 20_000), ("head", 50_000)):
        with pytest.MonkeyPatch.context() as patch:
            try:
                promises.test_blocks_do_not_shrink_with_the_data(name, n, patch)
                rows.append(Row(f"blocks: {name}, {n:,} samples", "as large as of a tenth", "as large", True))
            except AssertionError:
                rows.append(Row(f"blocks: {name}, {n:,} samples", "smaller", "as large", False))
    budget = 2**20 if strict else 2**28
    settings = quick(layer="first", method=ParticleSwarm(particles=100, iterations=3), budget=budget)
    data = sources("cuda", 400 if strict else 40_000)
    model = trained(Conv).cuda()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome = repair_module(model, data, settings)
    peak = torch.cuda.max_memory_allocated() - held
    rows.append(Row("peak over the budget", f"{peak / budget:.2f}", "<= 1.25", peak <= 1.25 * budget))
    small = quick(layer="first", method=ParticleSwarm(particles=100, iterations=3))
    with short_of_memory(strict):
        scarce = repair_module(model, data, small)
    same = counted(scarce) == counted(outcome) or scarce.report.status == "not repaired"
    rows.append(Row("with little memory", scarce.report.status, "the same, or a message", same))
    return rows


@contextmanager
def short_of_memory(strict: bool) -> Iterator[None]:
    """A device with little more memory than is in use."""
    import torch

    if strict:
        with sys.modules["strict_cuda"].memory_of(400_000):
            yield
        return
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**27) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def repeatable(strict: bool) -> list[Row]:
    """The same seed gives the same weights on the same card."""
    import torch
    from device_repairs import METHODS, sources
    from toy_repairs import mlp, trained

    from lightning_nrl import repair_module

    rows = []
    for name in ("convex", "arachne") if strict else METHODS:
        a, b = (repair_module(trained(mlp).cuda(), sources("cuda"), METHODS[name]).parameters or {} for _ in range(2))
        same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        rows.append(Row(f"twice: {name}", "bit for bit" if same else "other weights", "bit for bit", same))
    return rows


def precisions(strict: bool) -> list[Row]:
    """A fit and its repair in each precision of a Trainer, on the card."""
    from digit_models import Classifier, Digits
    from lightning_package import Trainer

    from lightning_nrl import RegressionFreeRepair
    from lightning_nrl.methods import FineTunePolish

    rows = []
    for precision in ("32-true", "bf16-mixed") if strict else ("32-true", "bf16-mixed", "16-mixed", "bf16-true"):
        with tempfile.TemporaryDirectory() as folder:
            repair = RegressionFreeRepair(dirpath=folder, method=FineTunePolish(), verbose=False, max_time=20)
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = Trainer(
                accelerator="gpu", devices=1, max_epochs=2, precision=precision, callbacks=[repair],
                enable_checkpointing=False, default_root_dir=folder, **quiet,
            )  # fmt: skip
            model = Classifier()
            trainer.fit(model, datamodule=Digits())
            trainer.save_checkpoint(Path(folder) / "later.ckpt")
        report = repair.report
        broken = sum(split.broken for split in report.splits if split.role == "known")
        rounding = f", {report.judge.within_rounding} within {report.judge.rounding:.2g}"
        found = f"{report.status}, {sum(s.repaired for s in report.splits)} repaired, {broken} broken{rounding}"
        rows.append(Row(f"fit, {precision}", found, "0 broken", broken == 0))
    return rows


QUICKSTART = """
import sys
sys.path.insert(0, "examples")
sys.argv = ["quickstart.py"]
text = open("examples/quickstart.py", encoding="utf-8").read()
text = text.replace('accelerator="cpu"', 'accelerator="gpu", devices=1')
exec(compile(text, "quickstart.py", "exec"), {"__name__": "__main__"})
"""


def in_a_process(code: str, seconds: float) -> tuple[int, str, float]:
    """Runs Python; its status, what it printed, and how long it took. From a file, which ddp starts once more."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "check.py"
        script.write_text(code, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", str(script)], cwd=ROOT, env=environment, timeout=seconds,
                capture_output=True, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124, f"not over after {seconds:.0f} s", seconds
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - began


def quickstart(strict: bool) -> list[Row]:
    """The first example, with its Trainers on the card."""
    if strict:
        return [Row("quickstart", "not run on the stand-in, which takes minutes for it")]
    status, text, seconds = in_a_process(QUICKSTART, 240)
    last = (text.strip().splitlines() or ["nothing printed"])[-1]
    found = f"over in {seconds:.0f} s" if status == 0 else last[:80]
    return [Row("quickstart on the card", found, "<= 240 s", status == 0)]


TWO_CARDS = """
import os
os.environ.update(MASTER_ADDR="127.0.0.1")
import tempfile, torch
from digit_models import Classifier, Digits
from lightning_package import Trainer
from lightning_nrl import RegressionFreeRepair
from lightning_nrl.report import hash_tensors
folder = os.environ.setdefault("GPU_CHECK_FOLDER", tempfile.mkdtemp())
repair = RegressionFreeRepair(dirpath=folder, verbose=False, max_time=60)
trainer = Trainer(accelerator="gpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[repair], logger=False,
                  enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
model = Classifier()
trainer.fit(model, datamodule=Digits())
own = hash_tensors({name: value.cpu() for name, value in model.state_dict().items()})
print("RANK", trainer.global_rank, repair.report.status, own, flush=True)
"""


def two_cards(strict: bool) -> list[Row]:
    """A repair on the second card while the first is the current one; two ranks with the same weights in the end."""
    import torch
    from device_repairs import CASES, sources
    from toy_repairs import trained

    from lightning_nrl import repair_module

    if torch.cuda.device_count() < 2:
        return [Row("two cards", "there is one")]
    rows = []
    for name in ("swarm", "convex", "finetune-polish"):
        make, settings = CASES[name]
        outcome = repair_module(trained(make).to("cuda:1"), sources("cuda:1"), settings)
        places = {str(value.device) for value in (outcome.parameters or {}).values()}
        found = f"{outcome.report.status}, weights on {', '.join(sorted(places)) or 'none'}"
        rows.append(Row(f"on cuda:1: {name}", found, "weights on cuda:1", places <= {"cuda:1"}))
    if strict:
        return [*rows, Row("ddp on two cards", "not run on the stand-in, which has no NCCL")]
    status, text, seconds = in_a_process(TWO_CARDS, 240)
    ranks = [line.split() for line in text.splitlines() if line.startswith("RANK")]
    same = status == 0 and len(ranks) == 2 and ranks[0][2:] == ranks[1][2:]
    found = f"{len(ranks)} ranks, {seconds:.0f} s" if status == 0 else text.strip().splitlines()[-1][:80]
    return [*rows, Row("ddp on two cards", found, "the same weights on both", same)]


CHECKS: dict[str, Callable[[bool], list[Row]]] = {
    "card": card,
    "exactness": exactness,
    "waits": waits,
    "speed": speed,
    "memory": memory,
    "repeatable": repeatable,
    "precisions": precisions,
    "quickstart": quickstart,
    "two_cards": two_cards,
}

if __name__ == "__main__":
    sys.exit(main())
