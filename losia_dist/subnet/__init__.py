"""The subnet of a linear layer: computing with it, putting it into a model, grouping it for an optimizer."""
