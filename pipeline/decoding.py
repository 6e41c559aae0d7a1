"""DALI graphs: encoded bytes in, normalised images out. On the GPU where that was shown to work, else the CPU.

DALI's GPU decoders have had faults that crash the process (nvImageCodec issue 55), which no `except` catches.
`choose_backend` therefore tries each GPU path in a subprocess on real JPEGs and compares its pixels with the
CPU's before a run uses it. Which backend ran is recorded: pixels are exact only for the same decoder.
"""

import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.command import log
from models.preprocess import Preprocessing
from pipeline import augment, pixels, resizing, spaces
from pipeline.data_config import DataSettings

Backend = Literal["cpu", "gpu-slice", "gpu-roi"]
"""cpu; gpu-slice decodes only the crop; gpu-roi decodes the whole image and resizes the crop out of it."""

Source = Callable[[int], tuple[Any, ...]]
"""The inputs of batch n, in the graph's order; StopIteration after the last."""

MAX_PROBE_DIFFERENCE = 4.0
"""Mean absolute difference from the CPU's pixels (0 to 255) above which a GPU decoder is not trusted."""


def train_inputs(encoded: list[NDArray[np.uint8]], draws: augment.Draws) -> tuple[Any, ...]:
    """A batch as `train_graph` wants it."""
    levels: list[NDArray[np.int32]] = []
    if operations := draws.operations:
        for layer in range(operations.operations.shape[1]):
            levels += [
                values[:, layer].copy() for values in (operations.operations, operations.magnitudes, operations.signs)
            ]
    return encoded, draws.anchor, draws.shape, draws.mirror, *levels


def train_graph(
    source: Source, batch: int, settings: DataSettings, backend: Backend, threads: int, device_id: int | None
) -> Any:
    """Graph of what `train_inputs` gives.

    Returns:
        A built DALI pipeline whose `run()` gives float32 [batch, 3, S, S], S = settings.image_size: normalised, or from
        0 to 255 if the settings change levels, for pipeline/pixels.py to go on.
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import core, rand_augment, trivial_augment

    side, trivial = settings.image_size, settings.augment.trivialaugment
    layers = 0
    if augment.dali_operates(settings.augment, settings.rules):
        layers = 1 if trivial else settings.augment.randaugment_layers
    if trivial:
        suite = trivial_augment.get_trivial_augment_wide_suite()
    else:
        suite = rand_augment.get_rand_augment_suite(use_shape=False, max_translate_abs=round(side * 100 / 224))

    resizer = None
    if backend == "cpu" and resizing.is_ours(settings.train_interpolation, settings.train_antialias):
        extend = settings.rules >= 2
        resizer = resizing.Resizer(
            batch, side, threads, settings.train_interpolation, settings.train_antialias, extend=extend
        )

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
            source=source, num_outputs=4 + 3 * layers, batch=True
        )
        resize = {"size": [side, side], **_filter(settings.train_interpolation, settings.train_antialias)}
        place: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
        decoder = _decoder(settings, backend)
        if resizer is not None:
            images = fn.decoders.image_slice(encoded, anchor, shape, **place, **decoder)
            images = fn.python_function(images, function=resizer, batch_processing=True, output_layouts="HWC")
        elif backend != "gpu-roi":
            images = fn.resize(fn.decoders.image_slice(encoded, anchor, shape, **place, **decoder), **resize)
        elif settings.rules >= 2:
            images = fn.resize(fn.slice(fn.decoders.image(encoded, **decoder), anchor, shape, **place), **resize)
        else:  # the filter reads beyond the crop
            start = fn.cast(anchor, dtype=types.FLOAT)
            end = start + fn.cast(shape, dtype=types.FLOAT)
            images = fn.resize(fn.decoders.image(encoded, **decoder), roi_start=start, roi_end=end, **resize)
        for layer in range(layers):
            operation, magnitude, sign = levels[3 * layer : 3 * layer + 3]
            # The sign is random where the operation has a direction; all are fed, not drawn by DALI, whose
            # own generators depend on the place in the batch.
            images = core.select(
                suite,
                operation,
                data=images,
                magnitude_bin=core.signed_bin(magnitude, random_sign=sign),
                num_magnitude_bins=spaces.MAGNITUDES,
                fill_value=128,
                interp_type=types.INTERP_LINEAR,
            )
        return _normalise(
            images, None if pixels.changes_levels(settings) else preprocessing_of(settings), mirror=mirror
        )

    pipeline = graph()
    pipeline.build()
    return pipeline


def preprocessing_of(settings: DataSettings) -> Preprocessing:
    """What evaluation does to an image, and consumers of the model will."""
    assert settings.mean is not None, "the stage fills these in"
    assert settings.std is not None
    return Preprocessing(
        size=settings.image_size,
        resize="squash" if settings.eval_resize is None else "shorter",
        resize_to=settings.eval_resize,
        interpolation=settings.eval_interpolation,
        antialias=settings.eval_antialias,
        crop="torchvision" if settings.eval_resize is not None and settings.rules >= 2 else "exact",
        mean=settings.mean,
        std=settings.std,
        decoding="dali",
    )


def eval_inputs(
    encoded: list[NDArray[np.uint8]], prepared: Preprocessing, widths: NDArray[np.int64], heights: NDArray[np.int64]
) -> tuple[Any, ...]:
    """A batch as `eval_graph` wants it; sizes [B] in pixels of the upright images."""
    if prepared.resize == "squash":
        return (encoded,)
    boxes = [prepared.source_box(*size) for size in zip(heights.tolist(), widths.tolist(), strict=True)]
    start, extent = np.split(np.array(boxes), 2, axis=1)
    return encoded, start.astype(np.float32), (start + extent).astype(np.float32)


def eval_graph(
    source: Source,
    batch: int,
    settings: DataSettings,
    prepared: Preprocessing,
    backend: Backend,
    threads: int,
    device_id: int | None,
) -> Any:
    """Graph of what `eval_inputs` gives, prepared as a consumer of the model prepares it (models/preprocess.py)."""
    from nvidia.dali import fn, pipeline_def

    side, squash = prepared.size, prepared.resize == "squash"

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=2, exec_dynamic=True)
    def graph() -> Any:
        encoded, *roi = fn.external_source(source=source, num_outputs=1 if squash else 3, batch=True)
        images = fn.decoders.image(encoded, **_decoder(settings, backend))
        # The part that is shown is resized, and not the image cropped after it: an image of 20,000 x 2 pixels would
        # take 2 GB. The filter reads beyond the part all the same.
        place = {} if squash else {"roi_start": roi[0], "roi_end": roi[1]}
        images = fn.resize(images, size=[side, side], **place, **_filter(prepared.interpolation, prepared.antialias))
        return _normalise(images, prepared)

    pipeline = graph()
    pipeline.build()
    return pipeline


def _filter(interpolation: resizing.Interpolation, antialias: bool) -> dict[str, Any]:
    from nvidia.dali import types

    kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    return {"interp_type": kinds[interpolation], "antialias": antialias}


def _decoder(settings: DataSettings, backend: Backend) -> dict[str, Any]:
    from nvidia.dali import types

    if backend == "cpu":
        return {"device": "cpu", "output_type": types.RGB}
    return {"device": "mixed", "output_type": types.RGB, "hw_decoder_load": settings.hw_decoder_load}


def _normalise(images: Any, prepared: Preprocessing | None, **extra: Any) -> Any:
    """float32 [3, S, S] images, normalised as prepared; from 0 to 255 with None."""
    from nvidia.dali import fn, types

    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in prepared.mean] if prepared else 0.0,
        std=[255 * value for value in prepared.std] if prepared else 1.0,
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
    command = [sys.executable, "-m", "pipeline.decoding", backend, settings.model_dump_json()]
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
