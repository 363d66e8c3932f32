"""The main job: what `python train.py` does with the objects that its configuration names."""
