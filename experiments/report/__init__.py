"""``python -m experiments report``: any set of runs as tables, plots and one page to send.

`collect` reads runs, `statistics` makes means and intervals of them, `tables` and `figures` show
these, and `page` puts everything into one HTML file.
"""

from experiments.report.collect import Result, Setting, collect, write_compact
from experiments.report.report import Report

__all__ = ["Report", "Result", "Setting", "collect", "write_compact"]
