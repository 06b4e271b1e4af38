"""One paper, one file. Importing this package registers every component."""

from tta.methods import (
    adanpc,
    alpha_bn,
    bn,
    cotta,
    eata,
    lame,
    petal,
    rdumb,
    rmt,
    sar,
    source,
    tent,
    unmix_tns,
)

__all__ = [
    "adanpc",
    "alpha_bn",
    "bn",
    "cotta",
    "eata",
    "lame",
    "petal",
    "rdumb",
    "rmt",
    "sar",
    "source",
    "tent",
    "unmix_tns",
]
