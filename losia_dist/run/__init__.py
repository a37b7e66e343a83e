"""One run: the conductor, what it moves and checks, and what is written about it while it goes on."""
