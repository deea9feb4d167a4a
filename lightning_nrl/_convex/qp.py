"""The smallest change that does what rows of a linear system ask: quadratic programmes, solved in their dual.

A programme is

    min over x, s >= 0   1/2 |x|^2 + sum_i limit_i * s_i     so that   A x + s >= required,

where a row with an infinite limit is hard: its s is 0. Its dual has one multiplier a row and bounds alone,

    max over a   required' a - 1/2 a' K a     so that   0 <= a <= limit,     K = A A',

and x = A' a. Its value at any a is a lower bound of the minimum; it grows without limit exactly where no x fulfils the
hard rows.

There are two solvers, since each is far too slow at what the other is for. One programme of 955 rows takes the
semismooth Newton method 0.2 s and the active-set method 22 s; 208 programmes of up to 64 rows take the active-set
method, side by side, 0.08 s and the Newton method, one by one, 0.86 s. Both run on the CPU: they look at numbers at
each step, and a GPU would wait for the host some 30,000 times a repair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl._convex.active_set_qp import solve_batch
from lightning_nrl._convex.newton_qp import solve_one

__all__ = ["DualSolution", "solve_dual"]


class DualSolution(NamedTuple):
    """The solution of a dual; of a batch of `T` programmes every tensor has `T` as its first dimension."""

    values: Tensor  # m, one multiplier a row, from 0 to its limit; the change is x = A' values
    value: Tensor  # the dual's value there: a lower bound of the minimum
    is_solved: Tensor  # bool, whether the conditions of a solution hold to rounding; if not, it is the best found
    is_feasible: Tensor  # bool, whether the hard rows can be fulfilled; if not, `values` means nothing


@torch.no_grad()
def solve_dual(
    gram: Tensor,
    required: Tensor,
    limit: Tensor | None = None,
    start: Tensor | None = None,
    *,
    max_value: float = math.inf,
    is_over: Callable[[], bool] = lambda: False,
) -> DualSolution:
    """Solves one programme, or many small ones at once.

    Args:
        gram: `m x m`, K = A A', products of the rows; or `T x m x m`. A row of zeros that requires 0 is none.
        required: `m` or `T x m`, what each row must give at least.
        limit: `m`, from 0, of one programme; infinite for a hard row. None: all rows are hard.
        start: like `required`, multipliers to begin with, such as those of a similar programme; None: 0.
        max_value: programmes of a batch whose value exceeds it are left as they are then, as not feasible. Without it
            each of them must have a solution.
        is_over: of one programme, asked at each step whether time is over; then the best so far is given.

    Returns:
        The solution, computed in float64 on the CPU: `values` on the device of `gram` and in its dtype, the rest on the
        CPU, so that it can be looked at without a wait.
    """
    device, dtype = gram.device, gram.dtype
    g, b = (x.to("cpu", torch.float64) for x in (gram, required))
    a = torch.zeros_like(b) if start is None else start.to("cpu", torch.float64)
    if g.ndim == 3:
        a, value, is_solved = solve_batch(g, b, a, max_value)
        is_feasible = ~(value > max_value)
    else:
        limits = torch.full_like(b, torch.inf) if limit is None else limit.to("cpu", torch.float64)
        a, solved, feasible = solve_one(g, b, limits, a, is_over)
        value = b @ a - 0.5 * (a @ (g @ a))
        is_solved, is_feasible = torch.tensor(solved), torch.tensor(feasible)
    return DualSolution(a.to(device, dtype), value, is_solved, is_feasible)
