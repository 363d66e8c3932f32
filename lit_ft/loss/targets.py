"""The label of tokens that are not targets."""

IGNORE_INDEX = -100  # transformers' and torch's own default
