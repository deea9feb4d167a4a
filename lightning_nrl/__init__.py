"""Regression-free repair of trained classifiers, as a PyTorch Lightning callback."""

__all__: list[str] = []
