"""From features to the subset that is trained on."""
