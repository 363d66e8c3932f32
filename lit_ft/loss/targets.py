"""The label that says: this token is no target."""

IGNORED = -100  # transformers' and torch's own default
