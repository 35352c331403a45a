"""The page about a selection: what was drawn, and why."""
