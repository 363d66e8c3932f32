"""What the project promises as a whole: its YAML, its README, its defaults, its own tests."""
