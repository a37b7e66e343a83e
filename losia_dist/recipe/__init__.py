"""The training script behind `losia-dist train` and `launch/train.py`."""
