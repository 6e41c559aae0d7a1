"""DALI graphs: encoded bytes in, normalised images out. On the GPU where that was shown to work, else the CPU.

DALI's GPU decoders have had faults that crash the process (nvImageCodec issue 55), which no `except` catches.
`choose_backend` therefore tries each GPU path in a subprocess on real JPEGs and compares its pixels with the
CPU's before a run uses it. Which backend ran is recorded: pixels are exact only for the same decoder.
"""

import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.command import log
from pipeline.augment import RANDAUGMENT_OPERATIONS
from pipeline.config import DataSettings

Backend = Literal["cpu", "gpu-slice", "gpu-roi"]
"""cpu; gpu-slice decodes only the crop; gpu-roi decodes the whole image and resizes the crop out of it."""

Source = Callable[[int], tuple[Any, ...]]
"""The inputs of batch n, in the graph's order; StopIteration after the last."""

MAX_PROBE_DIFFERENCE = 4.0
"""Mean absolute difference from the CPU's pixels (0 to 255) above which a GPU decoder is not trusted."""


def train_graph(
    source: Source, batch: int, settings: DataSettings, backend: Backend, threads: int, device_id: int | None
) -> Any:
    """Graph of: encoded bytes, crop anchor, crop shape, mirror[, operation and sign a RandAugment layer].

    Returns:
        A built DALI pipeline whose `run()` gives float32 [batch, 3, S, S], S = settings.image_size.
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import core, rand_augment

    side, layers = settings.image_size, settings.augment.randaugment_layers
    suite = rand_augment.get_rand_augment_suite(use_shape=False, max_translate_abs=round(side * 100 / 224))
    assert len(suite) == RANDAUGMENT_OPERATIONS

    # Choosing an operation by sample is conditional execution.
    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=2,
        exec_dynamic=True,  # the executor that leaves alone what a tensor still holds: pipeline/loader.py counts on it
        enable_conditionals=layers > 0,
    )
    def graph() -> Any:
        encoded, anchor, shape, mirror, *levels = fn.external_source(
            source=source, num_outputs=4 + 2 * layers, batch=True
        )
        resize = {"size": [side, side], "interp_type": types.INTERP_LINEAR, "antialias": True}
        if backend == "gpu-roi":
            images = fn.decoders.image(encoded, device="mixed", output_type=types.RGB)
            start = fn.cast(anchor, dtype=types.FLOAT)
            images = fn.resize(images, roi_start=start, roi_end=start + fn.cast(shape, dtype=types.FLOAT), **resize)
        else:
            images = fn.decoders.image_slice(
                encoded,
                anchor,
                shape,
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                device="cpu" if backend == "cpu" else "mixed",
                output_type=types.RGB,
            )
            images = fn.resize(images, **resize)
        for layer in range(layers):
            operation, sign = levels[2 * layer], levels[2 * layer + 1]
            # The sign is random where the operation has a direction; both are fed, not drawn by DALI, whose
            # own generators depend on the place in the batch.
            magnitude = core.signed_bin(settings.augment.randaugment_magnitude, random_sign=sign)
            images = core.select(
                suite,
                operation,
                data=images,
                magnitude_bin=magnitude,
                num_magnitude_bins=31,
                fill_value=128,
                interp_type=types.INTERP_LINEAR,
            )
        return _normalise(images, settings, mirror=mirror)

    pipeline = graph()
    pipeline.build()
    return pipeline


def eval_graph(
    source: Source, batch: int, settings: DataSettings, backend: Backend, threads: int, device_id: int | None
) -> Any:
    """Graph of encoded bytes alone, prepared as a consumer of the model prepares them (models/preprocess.py)."""
    from nvidia.dali import fn, pipeline_def, types

    side = settings.image_size

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=2, exec_dynamic=True)
    def graph() -> Any:
        encoded = fn.external_source(source=source, num_outputs=1, batch=True)[0]
        images = fn.decoders.image(encoded, device="cpu" if backend == "cpu" else "mixed", output_type=types.RGB)
        if settings.eval_resize is None:
            images = fn.resize(images, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)
        else:
            images = fn.resize(
                images, resize_shorter=settings.eval_resize, interp_type=types.INTERP_LINEAR, antialias=True
            )
        return _normalise(images, settings, crop=(side, side), crop_pos_x=0.5, crop_pos_y=0.5)

    pipeline = graph()
    pipeline.build()
    return pipeline


def _normalise(images: Any, settings: DataSettings, **extra: Any) -> Any:
    from nvidia.dali import fn, types

    assert settings.mean is not None, "the stage fills these in"
    assert settings.std is not None
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in settings.mean],
        std=[255 * value for value in settings.std],
        **extra,
    )


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
def choose_backend(decode: Literal["auto", "cpu", "gpu"], gpu: bool) -> Verdict:
    """Settle where to decode: each GPU path is tried in a subprocess and compared with the CPU's pixels.

    Raises:
        ValueError: the GPU was demanded and there is none, or none of its paths works; the message says why.
    """
    if decode == "cpu" or (decode == "auto" and not gpu):
        return Verdict("cpu", "as set" if decode == "cpu" else "no GPU")
    if not gpu:
        raise ValueError("data.decode = 'gpu', but this rank has no GPU: use auto or cpu")
    reasons: list[str] = []
    candidates: tuple[Backend, ...] = ("gpu-slice", "gpu-roi")
    for backend in candidates:
        verdict = probe(backend)
        if verdict is None:
            return Verdict(backend, "; ".join([*reasons, "it passed the start-up probe"]))
        reasons.append(f"{backend}: {verdict}")
        log.warning("DALI start-up probe: %s", reasons[-1])
    if decode == "gpu":
        raise ValueError(f"data.decode = 'gpu', but no GPU path of DALI works here ({'; '.join(reasons)})")
    return Verdict("cpu", "; ".join(reasons))


def probe(backend: Backend, timeout_s: float = 120.0) -> str | None:
    """Try one GPU backend in a subprocess. None if it works, otherwise what went wrong."""
    command = [sys.executable, "-m", "pipeline.decoding", backend]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, cwd=Path(__file__).resolve().parents[1]
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed without a message"])[-1]
    log.info("DALI start-up probe: %s works, %s", backend, done.stdout.strip())
    return None


def _probe_images(count: int = 16) -> list[np.ndarray[Any, Any]]:
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


def _run_probe(backend: Backend) -> None:
    from PIL import Image

    images = _probe_images()
    sizes = np.array([Image.open(io.BytesIO(data.tobytes())).size[::-1] for data in images], np.int64)
    settings = DataSettings(corpus="", image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def source(batch: int) -> tuple[Any, ...]:
        if batch >= 2:
            raise StopIteration
        mirror = np.arange(len(images), dtype=np.int32) % 2
        return images, sizes // 5, sizes // 2 + batch, mirror

    pixels = {}
    for name in ("cpu", backend):
        device = None if name == "cpu" else 0
        runs = []
        for graph in (
            train_graph(source, len(images), settings, name, threads=2, device_id=device),
            eval_graph(lambda batch: source(batch)[:1], len(images), settings, name, threads=2, device_id=device),
        ):
            runs += [graph.run()[0] for _ in range(2)]
        pixels[name] = np.stack([np.array((r.as_cpu() if name != "cpu" else r).as_tensor()) for r in runs])
    difference = np.abs(pixels["cpu"] - pixels[backend]) * 127.5
    if difference.mean() > MAX_PROBE_DIFFERENCE:
        raise SystemExit(f"pixels differ from the CPU's by {difference.mean():.1f} of 255 on average")
    print(f"pixels differ from the CPU's by {difference.mean():.2f} of 255 on average, {difference.max():.0f} at most")


if __name__ == "__main__":
    _run_probe(sys.argv[1])  # type: ignore[arg-type]
