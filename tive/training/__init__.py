"""LLaVA's trainer and its check."""
