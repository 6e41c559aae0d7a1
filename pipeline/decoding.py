"""DALI graphs: encoded bytes in, normalised images out; where they decode, pipeline/decoder_choice.py settles."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.preprocess import Preprocessing
from pipeline import augment, pixels, resizing, spaces
from pipeline.data_config import DataSettings

Backend = Literal["cpu", "gpu-slice", "gpu-roi"]
"""cpu; gpu-slice decodes only the crop; gpu-roi decodes the whole image and resizes the crop out of it."""

Source = Callable[[int], tuple[Any, ...]]
"""The inputs of batch n, in the graph's order; StopIteration after the last."""


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

    with _own_aliases():
        pipeline = graph()
        pipeline.build()
    return pipeline


@contextmanager
def _own_aliases() -> Iterator[None]:
    """In the block DALI says nothing of operators that it calls by their old names itself.

    (DALI 2.4's RandAugment and TrivialAugment do, once for every operation, and no filter of warnings keeps it away.)
    """
    ops: Any = importlib.import_module("nvidia.dali.ops")
    kept = ops._handle_op_deprecation
    ops._handle_op_deprecation = lambda *arguments: None
    try:
        yield
    finally:
        ops._handle_op_deprecation = kept


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
