"""Decodes as training does: by NVIDIA DALI on the CPU, to RGB, turned upright by EXIF."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.storage import StorageError

_of_thread = threading.local()


class UndecodableError(ValueError):
    """An image that DALI does not decode."""


def decode_as_training(data: bytes | memoryview) -> NDArray[np.uint8]:
    """The pixels of an encoded image, uint8 [H, W, 3]; not to be written to.

    One image at a time costs what one of a batch costs (DALI 2.4: 2.8 CPU-ms for a PNG of 500 x 375), and a batch
    fails as a whole.

    Raises:
        UndecodableError: DALI cannot decode it.
        StorageError: DALI is not installed.
    """
    pipeline = getattr(_of_thread, "pipeline", None)
    if pipeline is None:
        pipeline = _of_thread.pipeline = _build()
    pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8)])
    try:
        (output,) = pipeline.run()
    except RuntimeError as error:
        _of_thread.pipeline = None  # one that has failed is of no more use; another takes 1 ms
        raise UndecodableError("the decoder of training (NVIDIA DALI) does not decode it: write it again") from error
    pixels: NDArray[np.uint8] = np.asarray(output.at(0))
    return pixels


def _build() -> Any:
    # Here, since most images (plain JPEGs) need no DALI: its import takes 0.2 CPU-s and 90 MB
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise StorageError(
            "images other than plain JPEGs are checked with the decoder of training, NVIDIA DALI, which is not here "
            f"({error}): shard them on Linux, with what requirements.lock names"
        ) from error

    # The dynamic executor leaves alone what an array still holds.
    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def graph() -> Any:
        return fn.decoders.image(fn.external_source(name="encoded", batch=True), device="cpu", output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    return pipeline
