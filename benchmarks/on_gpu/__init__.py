"""The parts of gpu.py: checks and speed on a GPU."""
