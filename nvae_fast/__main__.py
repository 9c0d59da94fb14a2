"""`python -m nvae_fast`: see `nvae_fast.cli`."""

import sys

from nvae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
