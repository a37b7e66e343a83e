"""The page that `losia-dist report` makes of what a run wrote about itself."""
