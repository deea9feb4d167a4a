"""What a method is given and what it gives: a problem in, a solution out.

In: the original model, what it does on known data, what may change. Out: `Proposal`, new weights and what they do on
known data, inside a `Solution`.
"""

from lightning_nrl.problem.problem import Method, Problem, Proposal, Solution, Training, better

__all__ = ["Method", "Problem", "Proposal", "Solution", "Training", "better"]
