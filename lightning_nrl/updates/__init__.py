"""A new model and the one that it replaces: what the old one does, training against regressions, weights in between."""
