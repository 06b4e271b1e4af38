"""One paper, one file. Importing this package registers every component."""

from tta.methods import alpha_bn, bn, cotta, eata, lame, petal, rmt, source, tent, unmix_tns

__all__ = ["alpha_bn", "bn", "cotta", "eata", "lame", "petal", "rmt", "source", "tent", "unmix_tns"]
