"""What the JSON files of a checkpoint must say: checked where they are read, by the rules of cluster/records.py.

A run's folder may be on storage that others write to. A checkpoint whose checksums fit may still be anybody's.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.records import Count, Digest, Record

Step = Annotated[int, Field(ge=0, lt=2**53)]
Shape = Annotated[list[Count], Field(max_length=8)]
Place = Annotated[tuple[Count, Digest], Field(strict=False)]
"""Where a state of a piece begins in the file, bytes, and its checksum."""
StoredPiece = Annotated[tuple[str, Count, Annotated[int, Field(ge=1, lt=2**50)], dict[str, Place]], Field(strict=False)]
"""Parameter, first element, how many, and where each of its states is."""


class Part(Record):
    """What the manifest says of a rank's part."""

    files: dict[str, Count]
    digest: Digest


class TrainingOfState(Record):
    """What a checkpoint is compared by whatever else changes."""

    global_batch: Annotated[int, Field(ge=1, lt=2**53)]


class SettingsOfState(Record):
    """The settings that decide what a run computes."""

    data: dict[str, Any]
    training: TrainingOfState


class State(Record):
    """What was saved beside the tensors, as far as it is there: older versions saved less."""

    shapes: dict[str, Shape]
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    micro_batch: Annotated[int, Field(ge=1, lt=2**53)] | None = None
    world_size: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    memory: Count = 0
    scores: dict[str, float] = Field(default_factory=dict)
    skipped: list[Step] = Field(default_factory=list)
    usual_losses: list[float] = Field(default_factory=list)
    unscored: bool = False


class ResumableState(State):
    """What must be there for a run to go on from a checkpoint."""

    architecture: dict[str, Any]
    corpus_hash: str
    settings: SettingsOfState
    precision: Literal["fp32", "bf16"]


class CheckpointManifest(Record):
    """manifest.json."""

    step: Step
    parts: Annotated[list[Part], Field(min_length=1)]
    state: State


def check_part_files(manifest: CheckpointManifest, name_of: Callable[[int], str]) -> str | None:
    """What is wrong with the names of the files of the parts; None if each rank has its own and no other."""
    for rank, part in enumerate(manifest.parts):
        if set(part.files) != {f"{name_of(rank)}.bin", f"{name_of(rank)}.json"}:
            return f"parts.{rank}.files: not the files of rank {rank}"
    return None


class Listing(Record):
    """rank-*.json: the pieces in a rank's file of numbers."""

    bytes: Count
    scalars: dict[str, float]
    pieces: list[StoredPiece]

    @model_validator(mode="after")
    def _inside(self) -> "Listing":
        for number, (_, _, count, places) in enumerate(self.pieces):
            for offset, _ in places.values():
                if offset % 4 or offset + 4 * count > self.bytes:
                    raise ValueError(f"pieces.{number} does not lie inside the {self.bytes} bytes of the file")
        return self


def elements(shape: Shape) -> int:
    """Numbers in a tensor of a shape."""
    return math.prod(shape)
