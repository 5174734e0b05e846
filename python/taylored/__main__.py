"""`python -m taylored`: the command, where its script is not on the PATH."""

import sys

from taylored._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
