"""
The few formulas that everything rests on, in PyTorch and in Triton; and how a CPU's threads wait.
"""
import os

# OpenMP's threads spin while they wait for each other. On a machine that others use too, a spinning thread
# takes the core from the very thread that it waits for, and a step becomes many times slower. PASSIVE lets
# them sleep. OpenMP reads this when torch is imported, so every command imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
