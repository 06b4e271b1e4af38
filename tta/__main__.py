"""``python -m tta``: the console script ``tta``, see `tta.cli`."""

import sys

from tta.cli import main

sys.exit(main())
