"""The label that says: this token is no target."""

IGNORE_INDEX = -100  # transformers' and torch's own default
