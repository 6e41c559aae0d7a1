"""The sizes of Vision Transformers by name, and what a configuration costs, in closed form."""

import re
from dataclasses import dataclass
from typing import Literal

from models.vit import VitConfig


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


def vit_config(
    name: str,
    *,
    image_size: int = 224,
    num_classes: int = 1000,
    channels: int = 3,
    pool: Literal["cls", "gap"] = "cls",
    representation_size: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    gelu: Literal["tanh", "erf"] = "tanh",
    norm_eps: float = 1e-6,
    head_bias: float = 0.0,
) -> VitConfig:
    """The architecture that is called "S/16" or "H/14": a letter of `SIZES` and the patch size in pixels.

    Raises:
        ValueError: no such name, or an option that does not fit (`VitConfig` says which).
    """
    match = re.fullmatch(rf"({'|'.join(SIZES)})/([1-9]\d*)", name)
    if match is None:
        raise ValueError(
            f"no architecture is called {name!r}: one of {', '.join(SIZES)} (case matters), a slash and the patch "
            "size in pixels would do, such as S/16 or H/14"
        )
    size = SIZES[match[1]]
    return VitConfig(
        image_size=image_size,
        patch_size=int(match[2]),
        width=size.width,
        depth=size.depth,
        mlp_dim=size.mlp_dim,
        heads=size.heads,
        num_classes=num_classes,
        channels=channels,
        pool=pool,
        representation_size=representation_size,
        dropout=dropout,
        drop_path=drop_path,
        gelu=gelu,
        norm_eps=norm_eps,
        head_bias=head_bias,
    )


def count_parameters(config: VitConfig, *, head: bool = True) -> int:
    """Number of parameters; without `head`, of the backbone alone (no representation layer either)."""
    d, m = config.width, config.mlp_dim
    embedding = (config.channels * config.patch_size**2 + 1) * d + config.tokens * d + (config.pool == "cls") * d
    block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * m + (m + 1) * d
    backbone = embedding + config.depth * block + 2 * d
    if not head:
        return backbone
    hidden = config.representation_size
    return backbone + ((d + 1) * hidden if hidden else 0) + ((hidden or d) + 1) * config.num_classes


def forward_macs(config: VitConfig) -> int:
    """Multiply-accumulates of the forward pass of one image, in matrix products and attention.

    Patch embedding n C p^2 D; a block 4 N D^2 + 2 N D M (dense layers) + 2 N^2 D (attention); and the head.
    """
    n, d, m = config.tokens, config.width, config.mlp_dim
    patches = config.grid**2 * config.channels * config.patch_size**2 * d
    block = 4 * n * d * d + 2 * n * d * m + 2 * n * n * d
    hidden = config.representation_size
    head = (d * hidden if hidden else 0) + (hidden or d) * config.num_classes
    return patches + config.depth * block + head


def train_flops(config: VitConfig) -> int:
    """Floating point operations of training on one image: 6 x `forward_macs`.

    Two for each multiply-accumulate; the backward pass costs twice the forward pass. Recomputed blocks are not
    counted, so that a utilisation computed from it compares between runs. Reproduces arXiv 2010.11929, table 6.
    """
    return 6 * forward_macs(config)
