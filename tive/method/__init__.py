"""The paper: per-record gradients, projection, influence, value (arXiv 2403.09559). Imports nothing of tive."""
