"""Tasks of lm-eval that come with lit_ft. None needs a network."""
