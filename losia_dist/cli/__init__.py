"""The command line: `losia-dist` and what training scripts share with it."""
