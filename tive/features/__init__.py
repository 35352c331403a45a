"""The feature folder: manifest, chunks, progress, lock."""
