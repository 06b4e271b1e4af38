"""``python -m corruptions``: the commands, each defined in `corruptions.commands`."""

import sys

from corruptions.commands import main

if __name__ == "__main__":  # processes that write import this module as well
    sys.exit(main())
