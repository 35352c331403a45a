"""Records, tasks, images, labels and forms of data files."""
