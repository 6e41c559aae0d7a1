"""The Vision Transformer of Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929).

This file imports torch and the standard library only: a copy of it travels inside every published model
package and is loaded there under a name of its own, beside the copies of other versions.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LARGEST = {
    "image_size": 1 << 14,
    "patch_size": 1 << 14,
    "width": 1 << 16,
    "depth": 1 << 10,
    "mlp_dim": 1 << 18,
    "heads": 1 << 10,
    "num_classes": 1 << 20,
    "channels": 1 << 10,
    "representation_size": 1 << 16,
    "tokens": 1 << 20,
}
"""Several times what the largest models in use have. A description with more, which may come with a package from
anywhere, is a mistake or an attack, and building a model of it would take hours before memory ends."""


@dataclass(frozen=True)
class VitConfig:
    """Everything that decides the shape and the arithmetic of a Vision Transformer.

    Raises:
        ValueError: a value or a combination of values that makes no model; the message names the field.
    """

    image_size: int
    """Height and width of the images in pixels; a multiple of `patch_size`."""
    patch_size: int
    """Height and width of a patch in pixels."""
    width: int
    """Length of a token's vector; a multiple of `heads`."""
    depth: int
    """Number of transformer blocks."""
    mlp_dim: int
    """Hidden units of the MLP of a block."""
    heads: int
    """Attention heads of a block."""
    num_classes: int
    """Number of outputs."""
    channels: int = 3
    """Colour channels of the images."""
    pool: Literal["cls", "gap"] = "cls"
    """What the head reads: the class token, or the average over all patches."""
    representation_size: int | None = None
    """Hidden units (tanh) of the two-layer pre-training head; None: the head is one linear layer."""
    dropout: float = 0.0
    """Probability of dropping a unit after each dense layer but qkv, and after adding the position embedding."""
    drop_path: float = 0.0
    """Probability of skipping a residual branch of the last block, per image; rises linearly from 0 (first)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """The tanh approximation (the original code) or the exact form (most ports)."""
    norm_eps: float = 1e-6
    """Epsilon of the layer norms."""
    head_bias: float = 0.0
    """Initial bias of the head; the paper's sigmoid recipes start at -10."""
    position_std: float = 0.02
    """Standard deviation of the initial position embedding; 0.02 in the paper's code."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field.name, field.type, getattr(self, field.name)))
        for name in ("image_size", "patch_size", "width", "depth", "mlp_dim", "heads", "num_classes", "channels"):
            _require(getattr(self, name) >= 1, f"{name} = {_short(getattr(self, name))} must be at least 1")
        for name, most in LARGEST.items():
            value = getattr(self, name) if name != "tokens" else self.tokens
            _require(value is None or value <= most, f"{name} = {_short(value)}: at most {most} would do")
        if self.image_size % self.patch_size:
            below = self.image_size - self.image_size % self.patch_size
            raise ValueError(
                f"image_size = {self.image_size} is not a multiple of patch_size = {self.patch_size}: "
                f"{f'{below} or ' if below else ''}{below + self.patch_size} would do"
            )
        _require(
            self.width % self.heads == 0,
            f"width = {self.width} does not split into heads = {self.heads} heads of equal width",
        )
        _require(
            self.representation_size is None or self.representation_size >= 1,
            f"representation_size = {self.representation_size} must be at least 1, or none for a one-layer head",
        )
        for name in ("dropout", "drop_path"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} = {value} must be at least 0 and below 1")
        for name in ("norm_eps", "position_std"):
            _require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be above 0")

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence: the patches and, with `pool="cls"`, the class token."""
        return self.grid**2 + (self.pool == "cls")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "VitConfig":
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: an unknown field, a missing one, or a value that does not fit; the message names it.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        _require(isinstance(values, Mapping), f"an architecture is no {type(values).__name__}")
        unknown = sorted(set(map(str, values)) - set(fields))
        _require(not unknown, f"unknown architecture field(s): {', '.join(name[:80] for name in unknown[:6])}")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        _require(not missing, f"architecture field(s) missing: {', '.join(missing)}")
        return cls(**values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _short(value: Any) -> str:
    """A value for messages, of any length and type."""
    if type(value) is int and value.bit_length() > 200:  # Python writes no number of thousands of digits
        return "a huge number"
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."


def _checked(name: str, kind: Any, value: Any) -> Any:
    """`value` if it is of the annotated type, an int made a float where a float is wanted."""
    if kind is float:
        finite = type(value) in (int, float) and abs(value) < 1e30  # and not NaN
        _require(finite, f"{name} = {_short(value)} must be a number")
        return float(value)
    if kind is int:
        _require(type(value) is int, f"{name} = {_short(value)} must be a whole number")
    elif kind == int | None:
        _require(value is None or type(value) is int, f"{name} = {_short(value)} must be a whole number or none")
    else:
        choices = kind.__args__
        known = isinstance(value, str) and value in choices
        _require(known, f"{name} = {_short(value)} must be one of {', '.join(map(repr, choices))}")
    return value


# ----------------------------------------------------------------------------------------------------------------
# Layers. Each initialises itself as it is built, so that a parameter can be partitioned (DeepSpeed's zero.Init) or
# live on the meta device as soon as its layer exists; `reset_parameters` draws anew after `to_empty`.
# Initialisation follows the paper's code (github.com/google-research/vision_transformer).
# ----------------------------------------------------------------------------------------------------------------


# On the meta device there is nothing to draw, and torch would load its compiler for it, which takes seconds.


def _xavier_uniform_(weight: Tensor) -> None:
    if not weight.is_meta:
        nn.init.xavier_uniform_(weight)


def _lecun_normal_(weight: Tensor) -> None:
    """Normal truncated at two standard deviations, variance 1 / fan-in after the truncation (flax's default)."""
    if not weight.is_meta:
        std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Dense(nn.Linear):
    """Linear layer; Xavier uniform weight, zero bias."""

    def reset_parameters(self) -> None:
        _xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class QueryKeyValue(Dense):
    """The three attention projections as one layer [D -> 3D], each initialised as the DxD matrix that it is."""

    def reset_parameters(self) -> None:
        for projection in self.weight.data.chunk(3):
            _xavier_uniform_(projection)
        nn.init.zeros_(self.bias)


class Representation(nn.Linear):
    """Hidden layer of the pre-training head; LeCun normal weight, zero bias."""

    def reset_parameters(self) -> None:
        _lecun_normal_(self.weight)
        nn.init.zeros_(self.bias)


class Head(nn.Linear):
    """Output layer; zero weight, constant bias."""

    initial_bias = 0.0

    def __init__(self, in_features: int, out_features: int, initial_bias: float) -> None:
        super().__init__(in_features, out_features)
        self.initial_bias = initial_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)


class PatchEmbedding(nn.Conv2d):
    """Convolution whose stride is its kernel: images [B, C, H, W] -> patches [B, N, D], row by row.

    LeCun normal weight, zero bias. As patches do not overlap, the convolution is one matrix product, which
    leaves the tokens contiguous.
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__(channels, width, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        _lecun_normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        p = self.kernel_size[0]
        patches = images.to(self.weight.dtype).reshape(batch, channels, height // p, p, width // p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention and MLP, each on a residual branch."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.qkv = QueryKeyValue(config.width, 3 * config.width)
        self.proj = Dense(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = Dense(config.width, config.mlp_dim)
        self.act = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.fc2 = Dense(config.mlp_dim, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]; `branch_scale` [2, B, 1, 1] multiplies the two residual branches."""
        attention = self.drop(self.proj(self._attend(self.qkv(self.norm1(x)))))
        x = x + (attention if branch_scale is None else attention * branch_scale[0])
        hidden = self.drop(self.act(self.fc1(self.norm2(x))))
        mlp = self.drop(self.fc2(hidden))
        return x + (mlp if branch_scale is None else mlp * branch_scale[1])

    def _attend(self, qkv: Tensor) -> Tensor:
        """[B, N, 3D] -> [B, N, D].

        q, k and v are views that the attention kernels take as they are; cut along the last dimension, their
        gradients come together again in a single copy.
        """
        batch, tokens, width = qkv.shape
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


class VisionTransformer(nn.Module):
    """Images [B, C, S, S] -> logits [B, num_classes], in the dtype of the weights.

    `torch.export` and `torch.onnx.export` take it as it is, with a dynamic batch; give them an example of two images or
    more, as torch.export (2.13) takes a dimension of 1 for a constant in any model.

    Attributes:
        checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.patch_embed = PatchEmbedding(config.channels, config.width, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.pool == "cls" else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.width))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.representation = (
            Representation(config.width, config.representation_size) if config.representation_size else None
        )
        self.head = Head(config.representation_size or config.width, config.num_classes, config.head_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw this module's own parameters; every layer below has a `reset_parameters` for its own."""
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if not self.pos_embed.is_meta:
            nn.init.normal_(self.pos_embed, std=self.config.position_std)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.representation is not None:
            features = torch.tanh(self.representation(features))
        return self.head(features)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] -> what the head reads, [B, D]."""
        config = self.config
        if images.ndim != 4 or images.shape[1:] != (config.channels, config.image_size, config.image_size):
            raise ValueError(
                f"images of shape {list(images.shape)}: this model takes "
                f"[batch, {config.channels}, {config.image_size}, {config.image_size}]"
            )
        x = self.patch_embed(images)
        if self.cls_token is not None:
            # `len(x)` would be a number in every exported graph.
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.drop(x + self.pos_embed)
        scales = self._branch_scales(x) if self.training and config.drop_path > 0 else [None] * config.depth
        for block, scale in zip(self.blocks, scales, strict=True):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, scale, use_reentrant=False)
            else:
                x = block(x, scale)
        # The norm works on each token by itself: with a class token the others need none.
        return self.norm(x[:, 0]) if config.pool == "cls" else self.norm(x).mean(dim=1)

    def _branch_scales(self, x: Tensor) -> list[Tensor]:
        """Stochastic depth (arXiv 1603.09382): for each block a factor [2, B, 1, 1] that is 0 or 1 / kept share.

        Drawn here for all blocks at once, so that a block holds no number of its own and one compiled block serves
        them all.
        """
        depth = self.config.depth
        drop = torch.linspace(0, self.config.drop_path, depth, device=x.device).view(depth, 1, 1, 1, 1)
        keep = 1 - drop
        kept = torch.rand(depth, 2, x.shape[0], 1, 1, device=x.device) < keep
        return list((kept / keep).to(x.dtype))

    def compile_blocks(self) -> None:
        """Compile each block in place (torch.compile); names and parameters of the modules stay as they are."""
        for block in self.blocks:
            block.compile(dynamic=False)


def kernel_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: the kernels of linear and convolution layers.

    Not biases, norms, the position embedding or the class token (a rule by number of dimensions would take those
    last two for kernels).
    """
    kernels = (nn.Linear, nn.Conv2d)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kernels)}
