"""One of two ranks runs out of memory: both end soon, each with a message, and no weight has
changed.
"""

from __future__ import annotations

import torch
from starved_rank import outcomes
from two_processes import free_port, in_two_processes

ENDS = ("collect", "localize", "search", "judge")
GOES_ON = ("fit", "polish")
"""Steps that do not fit on one rank end on both, and what was reached so far is judged."""


def test_a_rank_without_memory_ends_both(tmp_path):
    stages = (*ENDS, *GOES_ON)
    in_two_processes(outcomes, tmp_path, stages, [free_port() for _ in stages])
    other, starved = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for stage in stages:
        one, two = other[stage], starved[stage]
        assert one["same"]
        assert two["same"]
        assert max(one["seconds"], two["seconds"]) < 60
        if stage in GOES_ON:
            assert one["said"] == two["said"] == ""
        else:
            assert two["said"].startswith("DeviceMemoryError: memory ran out while"), stage
            assert one["said"].startswith("OtherRankError"), stage
            assert "HINT" in one["said"]
