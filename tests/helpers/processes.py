"""Processes of a test's own, to be killed or to run beside it.

They are forked from a server that has imported everything and run nothing. A copy of the test's
own process would inherit what ran in it: once anything there has made autograd start its threads
(an exporter does), backward in a fork is refused.
"""

from __future__ import annotations

import multiprocessing

CLEAN = multiprocessing.get_context("forkserver")
# What the children use is imported once, before them.
CLEAN.set_forkserver_preload(
    ["tta.methods", "tta.runtime", "tta.cli.run", "av", "timm", "tests.helpers.own_models"]
)
