"""Where an engine keeps weights and optimizer state. The only package, with `integrations`, that knows engines."""
