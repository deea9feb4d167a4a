"""Solvers: distilled fits, polishes with an active set, whitened layers, quadratic programmes."""
