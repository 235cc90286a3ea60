"""`python -m stca`: the command line, where the script `stca` is not on the path."""

import sys

from stca.commands import main

if __name__ == "__main__":
    sys.exit(main())
