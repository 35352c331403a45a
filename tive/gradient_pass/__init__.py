"""One chunk from records to features."""
