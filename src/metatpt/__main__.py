"""``python -m metatpt``."""

import sys

from metatpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
