"""``python -m experiments``: the commands, each defined in `experiments.cli`."""

import sys

from experiments.cli import main

sys.exit(main())
