"""Which of DALI's decoders a run uses: on the GPU where that was shown to work, else the CPU.

DALI's GPU decoders have had faults that crash the process (nvImageCodec issue 55), which no `except` catches.
`choose_backend` therefore tries each GPU path in a subprocess on real JPEGs and compares its pixels with the
CPU's before a run uses it. Which backend ran is recorded: pixels are exact only for the same decoder.
"""

import io
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.command import log
from pipeline import augment, pixels
from pipeline.data_config import DataSettings
from pipeline.decoding import Backend, eval_graph, eval_inputs, preprocessing_of, train_graph, train_inputs

MAX_PROBE_DIFFERENCE = 4.0
"""Mean absolute difference from the CPU's pixels (0 to 255) above which a GPU decoder is not trusted."""


@dataclass(frozen=True)
class Verdict:
    """Where to decode, and how that was settled."""

    backend: Backend
    why: str

    @classmethod
    def for_all(cls, verdicts: Sequence["Verdict"]) -> "Verdict":
        """What works on every rank: pixels of one run come from one decoder."""
        return max(verdicts, key=lambda verdict: ("gpu-slice", "gpu-roi", "cpu").index(verdict.backend))


@cache
def choose_backend(settings: DataSettings, gpu: bool) -> Verdict:
    """Settle where to decode: each GPU path is tried in a subprocess and compared with the CPU's pixels.

    It is tried as the run will use it: with its image size, augmentation and share of the hardware decoder.

    Raises:
        ValueError: the GPU was demanded and there is none, or none of its paths works; the message says why.
    """
    decode = settings.decode
    if decode == "cpu" or (decode == "auto" and not gpu):
        return Verdict("cpu", "as set" if decode == "cpu" else "no GPU")
    if not gpu:
        raise ValueError("data.decode = 'gpu', but this rank has no GPU: use auto or cpu")
    reasons: list[str] = []
    candidates: tuple[Backend, ...] = ("gpu-slice", "gpu-roi")
    for backend in candidates:
        verdict = probe(backend, settings)
        if verdict is None:
            return Verdict(backend, "; ".join([*reasons, "it passed the start-up probe"]))
        reasons.append(f"{backend}: {verdict}")
        log.warning("DALI start-up probe: %s", reasons[-1])
    if decode == "gpu":
        raise ValueError(f"data.decode = 'gpu', but no GPU path of DALI works here ({'; '.join(reasons)})")
    return Verdict("cpu", "; ".join(reasons))


def probe(backend: Backend, settings: DataSettings, timeout_s: float = 180.0) -> str | None:
    """Try one backend in a subprocess, as a run with these settings uses it. None if it works, else what went wrong."""
    command = [sys.executable, "-m", "pipeline.decoder_choice", backend, settings.model_dump_json()]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            cwd=Path(__file__).resolve().parents[1],
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed without a message"])[-1]
    log.info("DALI start-up probe: %s works, %s", backend, done.stdout.strip())
    return None


def _probe_images(count: int) -> list[np.ndarray[Any, Any]]:
    """JPEGs of several sizes with smooth content, as photographs have (decoders differ most at hard edges)."""
    from PIL import Image

    generator = np.random.default_rng(0)
    encoded = []
    for index in range(count):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        size = (240 + 37 * index, 200 + 29 * (index % 5))
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90, progressive=index % 4 == 3
        )
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return encoded


def _run_probe(backend: Backend, settings: DataSettings) -> None:
    from PIL import Image

    # Twice as many images as DALI has operations: each is applied with both signs.
    encoded = _probe_images(28)
    count = len(encoded)
    sizes = np.array([Image.open(io.BytesIO(data.tobytes())).size for data in encoded], np.int64)
    epochs, ids = np.zeros(count, np.int64), np.arange(count)
    operation = np.arange(count, dtype=np.int32)[:, None]

    def source(batch: int) -> tuple[Any, ...]:
        if batch >= 2:
            raise StopIteration
        draws = augment.draw(settings.augment, batch, epochs, ids, sizes[:, 0], sizes[:, 1], settings.rules)
        if draws.operations:
            every = np.broadcast_to(operation, draws.operations.operations.shape)
            draws = replace(draws, operations=replace(draws.operations, operations=every % 14, signs=every // 14))
        return train_inputs(encoded, draws)

    prepared = preprocessing_of(settings)

    def shown(batch: int) -> tuple[Any, ...]:
        if batch >= 2:
            raise StopIteration
        return eval_inputs(encoded, prepared, sizes[:, 0], sizes[:, 1])

    found = {}
    for name in ("cpu", backend):
        device = None if name == "cpu" else 0
        batches = []
        for training, graph in (
            (True, train_graph(source, count, settings, name, threads=2, device_id=device)),
            (False, eval_graph(shown, count, settings, prepared, name, threads=2, device_id=device)),
        ):
            for seed in range(2):
                images = torch.from_dlpack(graph.run()[0].as_tensor()).clone()
                batches.append(pixels.finish(images, settings, seed, epochs, ids) if training else images)
        found[name] = torch.stack(batches).cpu()
    assert settings.std is not None
    difference = (found["cpu"] - found[backend]).abs() * 255 * torch.tensor(settings.std).view(3, 1, 1)
    if difference.mean() > MAX_PROBE_DIFFERENCE:
        raise SystemExit(f"pixels differ from the CPU's by {difference.mean():.1f} of 255 on average")
    print(f"pixels differ from the CPU's by {difference.mean():.2f} of 255 on average, {difference.max():.0f} at most")


if __name__ == "__main__":
    _run_probe(sys.argv[1], DataSettings.model_validate_json(sys.argv[2]))  # type: ignore[arg-type]
