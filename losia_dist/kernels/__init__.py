"""Triton kernels for what plain torch does badly, each optional: `switch` says which are on, and torch serves the rest."""
