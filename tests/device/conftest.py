"""The stand-in is imported before torch or not at all."""

collect_ignore = ["strict_cuda.py"]
