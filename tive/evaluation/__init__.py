"""Held-out losses and answers of trained models."""
