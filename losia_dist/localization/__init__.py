"""Where the next subnet should be: importance, its reduction over ranks, selection, and when all that happens."""
