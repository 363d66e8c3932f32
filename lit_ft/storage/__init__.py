"""Files and folders that are complete or absent: checkpoints and the user's cache."""
