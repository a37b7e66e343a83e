"""Measurements of what LoSiA costs beside what a user would pick instead; `python -m benchmarks` lists them."""
