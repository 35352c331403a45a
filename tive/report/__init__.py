"""The page that shows what a selection took, and why: read, compute, draw, write."""
