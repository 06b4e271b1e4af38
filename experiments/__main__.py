"""``python -m experiments``: the commands, each defined in `experiments.commands`."""

import sys

from experiments.commands import main

sys.exit(main())
