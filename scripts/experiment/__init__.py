"""The experiment of docs/experiment.md: whether a selection chooses well, said in words that were fixed before."""
