"""Two ranks of one run as two processes, as a launcher such as `torchrun` starts them.

They come from a server that has imported torch and Lightning once, which takes several seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_package import NAME, pl

PRELOADED = ("torch._dynamo", "torchmetrics", NAME, "lightning_nrl.callbacks.repair")
"""Lightning before the package, which takes the one that is there."""


def in_two_processes(function: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Any]:
    """What a function of a module returns on each of two ranks; a `Trainer(devices=2,
    strategy="ddp")`
    starts no more.

    Raises:
        RuntimeError: a rank failed, or took too long; its own message is on stderr.
    """
    context = server()
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in (0, 1)]
        ranks = [
            context.Process(target=_on_rank, args=(i, port, file, function, args))
            for i, file in enumerate(files)
        ]
        for rank in ranks:
            rank.start()
        try:
            for rank in ranks:
                rank.join(seconds)
        finally:
            for rank in ranks:
                rank.kill()
        codes = [rank.exitcode for rank in ranks]
        if codes != [0, 0]:
            raise RuntimeError(f"the two processes ended with {codes}")
        return [torch.load(file, weights_only=False) for file in files]


def spawning() -> Any:
    """`ddp_spawn`, but that the processes it starts come from the server: nothing is imported
    again.
    """
    server()
    return pl.strategies.DDPStrategy(start_method="forkserver")


def server() -> Any:
    """Starts processes as `multiprocessing` does, from a process that has imported torch and
    Lightning.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _on_rank(
    rank: int, port: str, file: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ.update(found, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # a report's figures take a second
    torch.save(function(*args), file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """Of this machine, for a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
