"""Sources, continued training, files, loggers and a progress line from a Trainer, which stays as it is."""
