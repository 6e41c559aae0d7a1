"""The sizes of Vision Transformers by name, and what a configuration costs, in closed form."""

from typing import Literal

from models.sizes import SIZES, split_name
from models.vit import VitConfig


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
    named = split_name(name)
    if named is None:
        raise ValueError(
            f"no architecture is called {name!r}: one of {', '.join(SIZES)} (case matters), a slash and the patch "
            "size in pixels would do, such as S/16 or H/14"
        )
    size, patch = named
    return VitConfig(
        image_size=image_size,
        patch_size=patch,
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
