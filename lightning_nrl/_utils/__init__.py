"""What every package needs and none owns: ranks, precision, weights as tensors, time, files, names."""
