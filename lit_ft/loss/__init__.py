"""The training loss: a sum over target tokens, and the mean that a step optimises."""
