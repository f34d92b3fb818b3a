"""``python -m qtale`` is the command ``qtale``."""

import sys

from qtale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
