"""`python -m flax_lstm`: the command line, where its script is not on the path."""

import sys

from flax_lstm.cli import main

if __name__ == "__main__":
    sys.exit(main())
