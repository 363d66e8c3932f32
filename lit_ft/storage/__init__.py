"""Files and folders that are either complete or absent: checkpoints and the user's cache."""
