"""The sizes of Vision Transformers by name. Imports no torch: settings are checked by it before that is loaded."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The part of an architecture that its letter stands for."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


SIZES = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
}
"""B, L, H: arXiv 2010.11929, table 1; Ti, S: arXiv 2012.12877, table 1; g, G: arXiv 2106.04560, table 2.

H has 16 heads of width 80: the weights of another "huge" with 20 heads of width 64 do not fit it.
"""


def split_name(name: str) -> tuple[Size, int] | None:
    """The size and the patch in pixels that a name such as S/16 or H/14 stands for; None for what is no name."""
    match = re.fullmatch(rf"({'|'.join(SIZES)})/([1-9]\d{{0,8}})", name)
    return None if match is None else (SIZES[match[1]], int(match[2]))
