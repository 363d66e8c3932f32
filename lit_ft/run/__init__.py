"""The main job: `python train.py` runs it with the objects that its configuration names."""
