"""What a run writes about itself, and the page that `losia-dist report` makes of it."""
