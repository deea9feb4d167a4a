"""Studies around a repair: a diagnosis before it, baselines beside it, a sweep over many of them."""
