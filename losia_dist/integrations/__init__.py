"""Entry points for engines and trainers; with `sharding` the only package that knows them."""
