"""The command line: `losia-dist`."""
