"""Inside Lightning's Trainer: its data read again, its state borrowed, its training gone on with, files and screen.

In: a trainer, a LightningModule, its data loaders. Out: sources for the core, a continued training, files and a
progress line. The trainer and the module are left as they are found.
"""
