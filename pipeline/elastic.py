"""A rank's part of the training state, addressed by parameter: the same for every ZeRO stage and world size.

DeepSpeed keeps the fp32 weights and the optimizer's states of a rank in flat tensors whose layout depends on the
stage and on the number of ranks. A `Piece` says which elements of which parameter lie where in them. What is saved
piece by piece can be read by any other layout: each rank asks for the elements that its own pieces cover, and
nothing has to be converted. Weights, moments and the average go the same way; hyperparameters and the learning
rate are the new engine's own, and `step`, of which every flat tensor has its own, is set in each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.engine import base_optimizer
from pipeline.optimizer import EMA

WEIGHT = "weight"
"""Name of the fp32 weights among the states of a parameter."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + count) of a parameter, flattened, at `offset` of a flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: int
    """Which of the rank's flat tensors."""
    offset: int


@dataclass(frozen=True)
class Holdings:
    """What a rank holds of the training state.

    Attributes:
        pieces: where which elements lie.
        flats: the flat tensors, each with its states by name (`weight` is the tensor itself), one-dimensional.
        scalars: states of one number each (Adam's `step`), equal for all parameters; as `flats`.
        whole: every rank holds everything (ZeRO stage 0).
    """

    pieces: list[Piece]
    flats: list[dict[str, torch.Tensor]]
    scalars: list[dict[str, torch.Tensor]]
    whole: bool

    def states(self) -> list[str]:
        """Names of the states of every parameter."""
        return sorted({name for flat in self.flats for name in flat})

    def share(self, rank: int, ranks: int) -> list[Piece]:
        """The pieces that this rank saves: all of its own, or its slice of each where every rank has everything."""
        if not self.whole:
            return self.pieces
        shares = []
        for piece in self.pieces:
            first, last = (piece.count * number // ranks for number in (rank, rank + 1))
            if last > first:
                at = piece.offset + first
                shares.append(Piece(piece.name, piece.shape, piece.start + first, last - first, piece.flat, at))
        return shares


def holdings(engine: Any) -> Holdings:
    """This rank's part of an engine's state; states that come with the first update are made now."""
    zero, base = engine.optimizer, base_optimizer(engine)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if zero is base:
        parts = _unsharded(names)
    elif hasattr(zero, "fp32_partitioned_groups_flat"):
        parts = _stage3(zero, names)
    else:
        parts = _stages_1_and_2(zero, names)
    tensors: list[torch.Tensor] = []
    pieces = []
    for name, shape, start, count, tensor, offset in parts:
        number = next((n for n, known in enumerate(tensors) if known is tensor), len(tensors))
        if number == len(tensors):
            tensors.append(tensor)
        pieces.append(Piece(name, tuple(shape), start, count, number, offset))
    flats, scalars = [], []
    for tensor in tensors:
        if not base.state.get(tensor):
            base.state[tensor] = base.blank_state(tensor)
        states = base.state[tensor]
        large = {key: value for key, value in states.items() if value.numel() == tensor.numel() and key != "step"}
        flats.append({WEIGHT: tensor.detach().view(-1), **{key: value.view(-1) for key, value in large.items()}})
        scalars.append({key: value for key, value in states.items() if key not in large})
    return Holdings(pieces, flats, scalars, zero is base)


_Part = tuple[str, torch.Size, int, int, torch.Tensor, int]


def _unsharded(names: Mapping[torch.Tensor, str]) -> Iterator[_Part]:
    for parameter, name in names.items():
        yield name, parameter.shape, 0, parameter.numel(), parameter, 0


def _stages_1_and_2(zero: Any, names: Mapping[torch.Tensor, str]) -> Iterator[_Part]:
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:  # some of it is this rank's
                inside, at = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield names[parameter], parameter.shape, inside.start, inside.numel, flat, at.start


def _stage3(zero: Any, names: Mapping[torch.Tensor, str]) -> Iterator[_Part]:
    parameter: Any  # with DeepSpeed's attributes
    for parameter, name in names.items():
        group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
        start = share * dist.get_rank()
        # The last ranks' shares of a parameter may be padding, in part or in whole.
        count = max(0, min(share, parameter.ds_numel - start))
        if count:
            yield name, parameter.ds_shape, start, count, zero.fp32_partitioned_groups_flat[group], offset


@torch.no_grad()
def spread_weights(engine: Any) -> None:
    """Bring changed fp32 weights to the model's own, on every rank. All ranks call it."""
    zero = engine.optimizer
    if zero is base_optimizer(engine):
        return  # they are the same
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        # Small parameters stay whole on every rank between steps.
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@torch.no_grad()
def begin_with(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Make fp32 weights those that training begins with, and their average. All ranks call it, before the first step.

    In bf16 DeepSpeed (0.19.8) rounds the module first, and takes the rounded weights for its fp32 ones.

    Args:
        weights: of every parameter, whole, on any device.
    """
    held = holdings(engine)
    for piece in held.pieces:
        numbers = weights[piece.name].detach().flatten()[piece.start : piece.start + piece.count]
        for state in {WEIGHT, EMA} & held.flats[piece.flat].keys():
            held.flats[piece.flat][state][piece.offset : piece.offset + piece.count].copy_(numbers)
    spread_weights(engine)


@torch.no_grad()
def swap_average(engine: Any) -> None:
    """Exchange the weights and their average; called again, everything is as it was. All ranks call it."""
    for flat in holdings(engine).flats:
        weights = flat[WEIGHT].clone()
        flat[WEIGHT].copy_(flat[EMA])
        flat[EMA].copy_(weights)
    spread_weights(engine)


def restart(engine: Any, step: int, scalars: Mapping[str, float]) -> None:
    """After the tensors of a saved state were put in: everything else of it. All ranks call it.

    Args:
        step: optimizer steps taken.
        scalars: states of one number each, by name.
    """
    held = holdings(engine)
    for flat in held.scalars:
        for name, value in flat.items():
            value.fill_(scalars[name])
    base_optimizer(engine).guard.reset()
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()
    spread_weights(engine)
