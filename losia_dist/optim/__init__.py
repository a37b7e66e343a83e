"""The optimizer over subnet slices, and the learning rate ramp after re-localization."""
