"""Malformed and hostile input for every public entrance, made from a number.

``python -m tests.fuzz 12345`` prints what case 12345 calls, runs it, and says what it found. A case
depends on its number alone, so that it can be run again after a mend, in any process.
"""
