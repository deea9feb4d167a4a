"""What only a real card shows: seconds, a Trainer's precisions, a second card; the rest of memory
on any device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from device_repairs import GPU, METHODS, Conv, counted, sources
from lightning_package import Trainer
from repository import ROOT
from torch import nn
from toy_repairs import mlp, quick, trained

from lightning_nrl import (
    ParticleSwarm,
    RegressionFreeRepair,
    SearchOptions,
    Settings,
    TensorSource,
    repair_module,
)
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import FineTunePolish

STRICT = sys.modules.get("strict_cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
on_a_card = pytest.mark.skipif(STRICT is not None, reason="not on the stand-in")

Record = Callable[[str, object], None]


@on_a_card
@pytest.mark.parametrize("name", ["head", "convolution"])
def test_seconds_of_an_iteration(name, record_property):
    model, features, layer = (
        (nn.Linear(64, 10), 64, "auto") if name == "head" else (Conv(), 4, "first")
    )
    generator, seconds = torch.Generator().manual_seed(0), []
    x = torch.randn(4289, features, generator=generator)
    model = model.eval().to(GPU)
    with torch.no_grad():
        y = model(x.to(GPU)).argmax(1).cpu()
    moved = x + 0.05 * torch.randn(x.shape, generator=generator)
    data = TensorSource(moved, y, "all", passed=True, failed=True, batch_size=1024, device=GPU)
    for iterations in (100, 500):
        method = ParticleSwarm(particles=100, iterations=iterations, patience=10_000)
        search = SearchOptions(localizer=NeuRecoverLite(n_weights=50))
        report = repair_module(
            model, [data], Settings(method=method, layer=layer, search=search)
        ).report
        seconds.append(report.seconds["search"])
    each = (seconds[1] - seconds[0]) / 400
    record_property("found", f"{each * 1e6:,.0f} us")
    assert each <= 0.01


@contextmanager
def short_of_memory() -> Iterator[None]:
    """A device with little more memory than is in use."""
    if STRICT is not None:
        with STRICT.memory_of(400_000):
            yield
        return
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (torch.cuda.memory_reserved() + 2**27) / total)
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_keeps_to_a_budget_and_little_of_it_costs_nothing(record_property):
    budget, n = (2**28, 40_000) if STRICT is None else (2**20, 400)
    swarm = ParticleSwarm(particles=100, iterations=3)
    model, data = trained(Conv).to(GPU), sources(GPU, n)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome = repair_module(model, data, quick(layer="first", method=swarm, memory_limit=budget))
    peak = (torch.cuda.max_memory_allocated() - held) / budget
    record_property("found", f"peak over the budget {peak:.2f}")
    assert peak <= 1.25
    with short_of_memory():
        scarce = repair_module(model, data, quick(layer="first", method=swarm))
    assert scarce.report.status == "not repaired" or counted(scarce) == counted(outcome)


@pytest.mark.parametrize("name", ["convex", "arachne"] if STRICT else METHODS)
def test_the_same_seed_gives_the_same_weights(name):
    a, b = (
        repair_module(trained(mlp).to(GPU), sources(GPU), METHODS[name]).parameters or {}
        for _ in range(2)
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "precision", ["32-true", "bf16-mixed", *(() if STRICT else ("16-mixed", "bf16-true"))]
)
def test_a_fit_in_each_precision_breaks_nothing(precision, tmp_path, record_property):
    sys.path.append(str(ROOT / "tests" / "integration"))
    from digit_models import Classifier, Digits

    repair = RegressionFreeRepair(
        dirpath=tmp_path, method=FineTunePolish(), verbose=False, max_time=20
    )
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = Trainer(
        accelerator="gpu", devices=1, max_epochs=2, precision=precision, callbacks=[repair], **quiet
    )
    trainer.fit(Classifier(), datamodule=Digits())
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    record_property(
        "found", f"{repair.report.status}, {repair.report.pooled('known').repaired} repaired"
    )
    assert repair.report.pooled("known").broken == 0


TWO_CARDS = """
import os
os.environ.update(MASTER_ADDR="127.0.0.1")
import tempfile
from digit_models import Classifier, Digits
from lightning_package import Trainer
from lightning_nrl import RegressionFreeRepair
from lightning_nrl.records import hash_tensors
folder = os.environ.setdefault("GPU_CHECK_FOLDER", tempfile.mkdtemp())
repair = RegressionFreeRepair(dirpath=folder, verbose=False, max_time=60)
trainer = Trainer(
    accelerator="gpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[repair], logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
model = Classifier()
trainer.fit(model, datamodule=Digits())
own = hash_tensors({name: value.cpu() for name, value in model.state_dict().items()})
print("RANK", trainer.global_rank, repair.report.status, own, flush=True)
"""


@on_a_card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one card")
def test_two_cards_hold_the_same_weights(tmp_path):
    tests = ROOT / "tests"
    paths = [ROOT, tests, tests / "integration", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    script = tmp_path / "check.py"  # a file, which ddp starts once more
    script.write_text(TWO_CARDS, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [line.split() for line in done.stdout.splitlines() if line.startswith("RANK")]
    assert len(ranks) == 2
    assert ranks[0][2:] == ranks[1][2:]
