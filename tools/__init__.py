"""What builds and releases the package; no part of it, and imported by nothing in it."""
