"""One paper, one file. Importing this package registers every component."""

from tta.methods import adanpc, alpha_bn, bn, eata, lame, rdumb, sar, source, tent, unmix_tns

__all__ = [
    "adanpc",
    "alpha_bn",
    "bn",
    "eata",
    "lame",
    "rdumb",
    "sar",
    "source",
    "tent",
    "unmix_tns",
]
