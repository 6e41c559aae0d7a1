"""Checks the record of samples that a run keeps with log.samples=true: RUN/samples/rank-*.jsonl, a row a step."""

import json
from collections import Counter
from pathlib import Path
from typing import Any


def rows_of(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of every rank in the order they were written; a last one that was cut short is left out."""
    rows = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        rows[int(path.stem.split("-")[1])] = [json.loads(line) for line in lines if line]
    return rows


def steps_taken(folder: Path) -> list[int]:
    """The steps in the order they were taken, repeated ones too, as rank 0 saw them."""
    return [row["step"] for row in rows_of(folder)[0]]


def ids_by_step(folder: Path, global_batch: int) -> dict[int, list[int]]:
    """The samples of every step as it was taken last, in the order of the ranks."""
    last: dict[int, dict[int, list[int]]] = {}
    for rank, rows in rows_of(folder).items():
        for row in rows:
            last.setdefault(row["step"], {})[rank] = row["ids"]
    found = {}
    for step, parts in sorted(last.items()):
        # With fewer ranks in a later life, rows of the others are from before.
        world = global_batch // len(parts[0])
        found[step] = [sample for rank in range(world) for sample in parts[rank]]
    return found


def check(folder: Path, num_samples: int, global_batch: int, starts: list[int], last_step: int) -> None:
    """No gap and no repeat: every life goes on right behind the checkpoint that it resumed from, and every epoch has
    every sample once.

    Args:
        folder: RUN/samples.
        num_samples: in the corpus.
        starts: steps of the checkpoints that lives resumed from.
        last_step: how far to look.

    Raises:
        AssertionError: naming step or samples.
    """
    previous = 0
    for step in steps_taken(folder):
        assert step == previous + 1 or step - 1 in starts, f"step {step} was taken after step {previous}"
        previous = step
    ids = ids_by_step(folder, global_batch)
    missing = sorted(set(range(1, last_step + 1)) - ids.keys())
    assert not missing, f"steps {missing[:10]} are not in the record"
    assert all(len(ids[step]) == global_batch for step in range(1, last_step + 1))
    stream = [sample for step in range(1, last_step + 1) for sample in ids[step]]
    for epoch in range(len(stream) // num_samples):
        seen = Counter(stream[epoch * num_samples : (epoch + 1) * num_samples])
        twice = sorted(sample for sample, count in seen.items() if count > 1)
        never = sorted(set(range(num_samples)) - seen.keys())
        assert not twice, f"epoch {epoch}: samples {twice[:10]} came twice, {never[:10]} never"
        assert not never
