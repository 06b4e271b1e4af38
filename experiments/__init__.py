"""Experiments: data loaders, the runner, its records, tables and plots.

This package may import everything else in the repository; nothing imports it. It is not in the
wheel. ``python -m experiments --help`` lists what it can do.
"""
