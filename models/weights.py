"""Weights: safetensors files, loading with errors for people, changes of resolution and head, other layouts."""

import dataclasses
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.vit import VitConfig

State = dict[str, Tensor]
"""Parameters by name, as `VisionTransformer.state_dict` gives them."""


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message says which and what would do."""


def save_safetensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write `state` to `path`, in the dtype it has; complete or not at all (temporary name, fsync, rename)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name is safe once the folder is
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_safetensors(path: str | Path) -> State:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        WeightsError: no such file, or not a whole safetensors file.
    """
    if not Path(path).is_file():
        raise WeightsError(f"no weights at {path}: there is no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:  # of torch's own checks
        raise WeightsError(f"{path} is not a complete safetensors file ({error}): fetch or write it again") from error


def check_fits(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Refuse weights that are not those of `model` (which may live on the meta device).

    Args:
        strict: every parameter must be there and nothing else; otherwise only shapes must agree where both have one.

    Raises:
        WeightsError: a shape differs or, if strict, a name; the message lists them.
    """
    own = model.state_dict()
    complaints = [
        f"{name} has shape {list(state[name].shape)}, the model wants {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if strict:
        complaints += [f"{name} is missing" for name in own if name not in state]
        complaints += [f"{name} is unknown to the model" for name in state if name not in own]
    if complaints:
        raise WeightsError(f"the weights belong to another architecture: {_shortened(complaints)}")


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy `state` into the parameters of `model`, whatever their dtype and device.

    Args:
        strict: see `check_fits`; if false, what only one of both has is left alone.

    Raises:
        WeightsError: as `check_fits`. Nothing has been copied then.
    """
    check_fits(model, state, strict=strict)
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)


def _shortened(complaints: list[str], shown: int = 6) -> str:
    more = len(complaints) - shown
    return "; ".join(complaints[:shown]) + (f"; and {more} more" if more > 0 else "")


# ----------------------------------------------------------------------------------------------------------------
# Fine-tuning: another resolution, another head
# ----------------------------------------------------------------------------------------------------------------


def resize_position_embedding(
    pos_embed: Tensor,
    old_grid: int,
    new_grid: int,
    prefix: int = 1,
    *,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    antialias: bool = False,
) -> Tensor:
    """The position embedding for images of another size, [1, prefix + old_grid^2, D] -> [1, prefix + new_grid^2, D].

    Args:
        prefix: leading entries without a place in the image (the class token's), kept as they are.
        interpolation: "bilinear" aligns the corners, which is the zoom of order 1 of the paper's code (arXiv
            2010.11929, section 3.2). "bicubic" does not, as in DeiT and timm.
        antialias: with "bicubic": the filter is widened where the grid shrinks, as in timm. In torch that is the cubic
            of a = -0.5, where the one without antialias has -0.75.
    """
    if pos_embed.shape[1] != prefix + old_grid**2:
        raise WeightsError(
            f"position embedding with {pos_embed.shape[1]} entries, {prefix + old_grid**2} expected: "
            f"{prefix} for the class token and {old_grid} x {old_grid} for the patches"
        )
    if old_grid == new_grid:
        return pos_embed
    kept, patches = pos_embed.split([prefix, old_grid**2], dim=1)
    image = patches.unflatten(1, (old_grid, old_grid)).permute(0, 3, 1, 2).float()
    size = (new_grid, new_grid)
    if interpolation == "bilinear":
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
    else:
        image = F.interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    resized = image.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([kept, resized], dim=1)


FREE_TO_CHANGE = frozenset(
    {"image_size", "num_classes", "representation_size", "dropout", "drop_path", "head_bias", "position_std"}
)
"""Fields of VitConfig in which fine-tuning may differ from pre-training."""


def adapt_for_finetuning(
    state: Mapping[str, Tensor],
    old: VitConfig,
    new: VitConfig,
    *,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    antialias: bool = False,
) -> State:
    """Pre-trained weights made ready for fine-tuning: the arguments are left as they are.

    The whole head, representation layer included, is replaced by one linear layer with zero weight and the bias
    `new.head_bias` (arXiv 2010.11929, section 3.2), and the position embedding is resized to the new resolution.

    Args:
        interpolation, antialias: of the position embedding, as in `resize_position_embedding`.

    Raises:
        WeightsError: the two architectures differ in more than that; the message names each difference.
    """
    differences = [
        f"{name}: the weights have {getattr(old, name)!r}, this run wants {getattr(new, name)!r}"
        for name in (field.name for field in dataclasses.fields(VitConfig))
        if name not in FREE_TO_CHANGE and getattr(old, name) != getattr(new, name)
    ]
    if differences:
        raise WeightsError(f"the weights belong to another architecture: {_shortened(differences)}")
    if new.representation_size is not None:
        raise WeightsError(
            "representation_size must be none: fine-tuning replaces the two-layer pre-training head by one layer"
        )
    adapted = {n: t for n, t in state.items() if not n.startswith(("head.", "representation."))}
    pos_embed = state["pos_embed"]
    prefix = int(old.pool == "cls")
    adapted["pos_embed"] = resize_position_embedding(
        pos_embed, old.grid, new.grid, prefix, interpolation=interpolation, antialias=antialias
    )
    adapted["head.weight"] = torch.zeros(new.num_classes, new.width, dtype=pos_embed.dtype)
    adapted["head.bias"] = torch.full((new.num_classes,), new.head_bias, dtype=pos_embed.dtype)
    return adapted


# ----------------------------------------------------------------------------------------------------------------
# The layout of the transformers library (ViTModel, ViTForImageClassification)
# ----------------------------------------------------------------------------------------------------------------

_OUTSIDE_BLOCKS = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "representation": "vit.pooler.dense",
    "head": "classifier",
}
_IN_A_BLOCK = {
    "norm1": "layernorm_before",
    "proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_PROJECTIONS = ("query", "key", "value")
_NAMES_IN_MEMORY = {
    r"^vit\.layers\.": "vit.encoder.layer.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
"""What transformers 5 calls parameters in memory -> what all its versions call them in files."""


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """Weights of transformers' ViTForImageClassification or ViTModel in our names.

    Takes the names of its files and those of its modules. The pooler, if there is one, becomes the
    representation layer. The matching VitConfig has `pool="cls"`, `gelu="erf"` (its "gelu") and the
    `norm_eps` of its configuration, which is not the 1e-6 of the paper unless it says so.

    Raises:
        WeightsError: a name that its ViT does not have.
    """
    ours: State = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    outside = {theirs: name for name, theirs in _OUTSIDE_BLOCKS.items()}
    inside = {theirs: name for name, theirs in _IN_A_BLOCK.items()}
    for given, tensor in state.items():
        name = given if given.startswith(("vit.", "classifier.")) else f"vit.{given}"
        for pattern, replacement in _NAMES_IN_MEMORY.items():
            name = re.sub(pattern, replacement, name)
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"vit\.encoder\.layer\.(\d+)\.(.+)", module)
        projection = re.fullmatch(r"attention\.attention\.(query|key|value)", block[2]) if block else None
        if name in outside:
            ours[outside[name]] = tensor
        elif module in outside:
            ours[f"{outside[module]}.{kind}"] = tensor
        elif block and projection:
            qkv.setdefault(f"blocks.{block[1]}.qkv.{kind}", {})[projection[1]] = tensor
        elif block and block[2] in inside:
            ours[f"blocks.{block[1]}.{inside[block[2]]}.{kind}"] = tensor
        else:
            raise WeightsError(f"{given} is no parameter of transformers' ViT: is this another architecture?")
    for name, parts in qkv.items():
        if len(parts) != len(_PROJECTIONS):
            raise WeightsError(f"{name} needs query, key and value; the weights have only {', '.join(parts)}")
        ours[name] = torch.cat([parts[projection] for projection in _PROJECTIONS])
    return ours


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """Our weights under the names of the files of transformers' ViTForImageClassification.

    Its configuration needs `hidden_act` "gelu" for `gelu="erf"` or "gelu_pytorch_tanh" for "tanh", and
    `layer_norm_eps` = `norm_eps`.

    Raises:
        WeightsError: a model with average pooling or a two-layer head, which transformers' ViT has not.
    """
    if "cls_token" not in state:
        raise WeightsError("transformers' ViT reads the class token; a model with average pooling does not convert")
    if "representation.weight" in state:
        raise WeightsError("transformers' ViT classifier has a one-layer head; fine-tune before converting")
    theirs: State = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if name in _OUTSIDE_BLOCKS:
            theirs[_OUTSIDE_BLOCKS[name]] = tensor
        elif block is None:
            theirs[f"{_OUTSIDE_BLOCKS[module]}.{kind}"] = tensor
        elif block[2] == "qkv":
            for projection, part in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
                key = f"vit.encoder.layer.{block[1]}.attention.attention.{projection}.{kind}"
                theirs[key] = part.contiguous()
        else:
            theirs[f"vit.encoder.layer.{block[1]}.{_IN_A_BLOCK[block[2]]}.{kind}"] = tensor
    return theirs
