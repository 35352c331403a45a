"""What the steps cost, measured; `scripts/benchmark.py` is the command."""
