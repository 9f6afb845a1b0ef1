"""The few formulas that everything rests on: one file each, first in plain PyTorch, then fast."""
