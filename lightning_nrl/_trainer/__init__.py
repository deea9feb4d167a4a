"""Inside Lightning's Trainer: its data, its state, its training and its files, for a repair.

In: a trainer, a LightningModule, its data loaders. Out: sources, a continued training, files, a progress line.
"""
