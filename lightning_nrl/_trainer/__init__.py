"""A repair inside Lightning's Trainer: data, state, training, files and progress.

In: a trainer, a LightningModule, its data loaders. Out: sources, a continued training, files, a
progress line.
"""
