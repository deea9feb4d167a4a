"""What a method is given and what it gives: a problem in, a solution out.

In: the original model in an `Evaluator`, what it does on known data, what may change. Out: `Proposal`, new weights and
what they do on known data, inside a `Solution`. `Method` is the call that turns one into the other.
"""

from lightning_nrl.problem.problem import Method, Problem, Training
from lightning_nrl.problem.solution import Proposal, Solution, better

__all__ = ["Method", "Problem", "Proposal", "Solution", "Training", "better"]
