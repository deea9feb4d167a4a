"""A search on one process and on two, each with half of the samples, as a distributed sampler gives them.

A convolution in the last stage of a residual network of 27, 100 particles; processor seconds of the rank that takes
longest, since wall time says little on a busy machine. Both find the same weights. Run with
`python tests/benchmarks/two_ranks.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from bench import ResNet27, show
from torch import nn
from two_processes import in_two_processes

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search import ParticleSwarm, WeightStats, search
from lightning_nrl.search._scoring.recording import record
from lightning_nrl.search._scoring.scorer import make_scorer
from lightning_nrl.search.fitness import Fitness

N, ITERATIONS = 120, 2
LAYERS = {"last block, second": "stages.2.3.conv2", "last stage, first block": "stages.2.0.conv1"}
FITNESSES = {"all finished": Fitness("eq1"), "giving up": Fitness()}


def searched(layer: str, fitness: str, collective: Collective) -> tuple[float, str]:
    """Processor seconds of this rank, and what was found."""
    torch.manual_seed(0)
    model, x = ResNet27().eval(), torch.randn(N, 3, 32, 32)
    with torch.no_grad():
        y = model(x).argmax(1)
    failed = torch.arange(N) % 5 == 0
    y[failed] = (y[failed] + 1) % 7
    space = find_layers(model, LAYERS[layer])
    mine = torch.arange(collective.rank, N, collective.world_size)
    evaluator = Evaluator(model, collective=collective)
    batches = [(Batch((x[rows],), y[rows], rows), rows) for rows in mine.split(50)]
    recording = record(evaluator, batches, space, torch.ones(N, dtype=torch.bool))
    where = torch.randperm(space.size)[:300].sort().values
    scorer = make_scorer(recording, where, failed, ~failed, Evaluator(nn.Identity(), collective=collective))
    began = time.process_time()
    found = search(
        scorer,
        space.flat()[where],
        WeightStats.around(space, where),
        fitness=FITNESSES[fitness],
        searcher=ParticleSwarm(iterations=ITERATIONS),
    )
    return time.process_time() - began, hash_tensors({"values": found.values})


def on_rank(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    collective = Collective.current(torch.device("cpu"))
    found = {f"{layer}, {fitness}": searched(layer, fitness, collective) for layer in LAYERS for fitness in FITNESSES}
    Path(folder, f"{collective.rank}.json").write_text(json.dumps(found))


def main() -> None:
    torch.set_num_threads(1)
    alone = {f"{layer}, {fitness}": searched(layer, fitness, Collective()) for layer in LAYERS for fitness in FITNESSES}
    with tempfile.TemporaryDirectory() as folder:
        in_two_processes(on_rank, folder, seconds=1800)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]
    rows = []
    for name, (seconds, _) in alone.items():
        most = max(rank[name][0] for rank in ranks)
        assert ranks[0][name][1] == ranks[1][name][1]
        rows.append([name, f"{seconds:.2f} s", f"{most:.2f} s", f"{seconds / most:.2f}"])
    show(f"{ITERATIONS} iterations on {N} samples", ["layer", "one process", "the slower of two", "ratio"], rows)


if __name__ == "__main__":
    main()
