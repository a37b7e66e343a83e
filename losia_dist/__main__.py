"""`python -m losia_dist`: the same as `losia-dist`."""

import sys

from losia_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
