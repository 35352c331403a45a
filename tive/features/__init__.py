"""Step 3: the gradient pass, from records to the feature folder, and the folder's reader."""
