"""Scores on tasks of lm-eval, EleutherAI's evaluation harness."""
