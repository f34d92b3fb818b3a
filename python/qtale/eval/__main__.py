"""``python -m qtale.eval`` is the command ``qtale eval``."""

import sys

from qtale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
