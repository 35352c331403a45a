"""Errors, files, text, device. Imports nothing of tive."""
