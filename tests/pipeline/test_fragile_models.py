"""A model that fails in the middle of a repair: it is left as it was, and nothing is accepted."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, quick, trained

from lightning_nrl import repair_module
from lightning_nrl.errors import RepairError


class Fragile(nn.Module):
    """From some call on it raises, or gives nothing but NaN."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = trained(), how
        self.calls, self.fails_at = 0, 1 << 60

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls < self.fails_at:
            return self.net(x)
        if self.how == "raises":
            raise ZeroDivisionError("on purpose")
        return self.net(x) * torch.nan


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["raises", "NaN"])
@pytest.mark.parametrize("method", ["swarm", "convex", "linearized", "finetune-polish"])
def test_a_failure_at_any_call_leaves_the_model_as_it_was(method: str, how: str) -> None:
    settings = quick() if method == "swarm" else quick(method=method)
    model = Fragile(how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    repair_module(model, known(n=60), settings)
    total = model.calls
    for share in (0.25, 0.99):
        model.calls, model.fails_at = 0, max(2, int(share * total))
        if how == "raises":
            with pytest.raises(ZeroDivisionError):
                repair_module(model, known(n=60), settings)
        else:
            with suppress(RepairError):
                assert repair_module(model, known(n=60), settings).report.status != "repaired"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        assert torch.is_grad_enabled()
