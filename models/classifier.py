"""Answers of a published model: `load_classifier` reads a package's weights and description and runs none of its code.

`mlflow.pyfunc.load_model` runs the Python files inside a package, as it does for every MLflow model; this runs what is
installed here. It needs torch, numpy and Pillow. A copy of this file travels inside every package beside vit.py and
preprocess.py, so that both ways give the same answers; it therefore imports neither of the two at its beginning.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

FORMAT_VERSION = 1
"""Of model.json. A reader refuses a newer one."""

BATCH = 64
"""Images that go through the model at once."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights, as safetensors calls them."""

ADDED_BY_READERS = ("registered_model_meta", "__pycache__")
"""Names that no package is published with: MLflow writes the first beside what it downloads, Python the second."""


class ClassifierError(ValueError):
    """A package that cannot be read or is not the one that was published, or a request that cannot be answered."""


@dataclass
class Classifier:
    """Images in, class names and probabilities out."""

    model: torch.nn.Module
    """[B, 3, S, S] -> logits [B, classes]."""
    preprocessing: Any
    """Images -> fp32 [B, 3, S, S] (models/preprocess.py)."""
    classes: list[str]
    """Names in the order of the logits."""
    activation: str
    """softmax or sigmoid."""
    device: torch.device

    def classify(
        self, images: Sequence[Any] | npt.NDArray[np.uint8] | Image.Image, top_k: int | None = None
    ) -> list[list[tuple[str, float]]]:
        """The `top_k` most probable classes of each image with their probabilities, most probable first.

        Args:
            images: encoded images (bytes), uint8 arrays [H, W, 3] and Pillow's images; or one array [B, H, W, 3]; or a
                single image of any kind, which is answered as a list of one.
            top_k: 1 to the number of classes; None: 5, or all if there are fewer.

        Raises:
            ClassifierError: an image that cannot be read (it says which one and why), or a `top_k` out of range.
        """
        several = _as_list(images)
        if top_k is None:
            top_k = min(5, len(self.classes))
        if not 1 <= top_k <= len(self.classes):
            raise ClassifierError(
                f"top_k = {top_k}: the model has {len(self.classes)} classes, 1 to {len(self.classes)} would do"
            )
        answers: list[list[tuple[str, float]]] = []
        for start in range(0, len(several), BATCH):
            best = self._probabilities(several[start : start + BATCH], start).topk(top_k, dim=1)
            for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                answers.append([(self.classes[n], value) for n, value in zip(numbers, values, strict=True)])
        return answers

    @torch.inference_mode()
    def _probabilities(self, images: Any, offset: int) -> torch.Tensor:
        """[B, classes], fp32, on the CPU."""
        try:
            pixels = self.preprocessing(images)
        except ValueError as error:
            place = f" (in the batch that starts at row {offset})" if offset else ""
            raise ClassifierError(f"{error}{place}") from error
        logits = self.model(pixels.to(self.device)).float()
        return (logits.softmax(dim=1) if self.activation == "softmax" else logits.sigmoid()).cpu()


def load_classifier(folder: str | Path, digest: str | None = None, device: str | None = None) -> Classifier:
    """The classifier in a package's folder, such as `mlflow artifacts download -u models:/NAME/1` makes.

    Args:
        digest: tag `vitforge.package` of the model's version in the registry: all of the package's files are compared
            with it first. None compares nothing.
        device: None is the GPU if there is one.

    Raises:
        ClassifierError: no package, a damaged one, or not the one that was published.
    """
    from models import preprocess, vit

    folder = Path(folder)
    if not (folder / "artifacts" / "model.json").is_file():
        raise ClassifierError(f"{folder} is no package of this project: it has no artifacts/model.json")
    if digest is not None and package_digest(folder) != digest:
        raise ClassifierError(
            f"{folder} is not the package that was published: its files have another digest. Download it again; if it "
            "stays so, the store of the models was changed"
        )
    artifacts = folder / "artifacts"
    return read_classifier(artifacts / "model.json", artifacts / "weights.safetensors", vit, preprocess, device)


def read_classifier(
    description: Path, weights: Path, vit: ModuleType, preprocess: ModuleType, device: str | None = None
) -> Classifier:
    """The classifier of a model.json and a safetensors file.

    Args:
        vit, preprocess: the modules of those names, of this project or of a package.

    Raises:
        ClassifierError: one of the files cannot be read, or they do not fit together.
    """
    try:
        values = json.loads(description.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version > FORMAT_VERSION:
            raise ClassifierError(f"package format {version} is newer than the {FORMAT_VERSION} that this code reads")
        classes, activation = [str(name) for name in values["classes"]], values["activation"]
        config = vit.VitConfig.from_json(values["architecture"])
        preprocessing = preprocess.Preprocessing.from_json(values["preprocessing"])
    except ClassifierError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ClassifierError(f"{description} is no description of a model ({_first_line(error)})") from error
    if activation not in ("softmax", "sigmoid") or len(classes) != config.num_classes:
        raise ClassifierError(f"{description}: {len(classes)} class names, activation {activation!r} do not fit")
    state = _read_safetensors(weights)
    if config.depth > len(state):  # before as many blocks are built
        raise ClassifierError(f"{weights} has {len(state)} tensors, too few for {config.depth} blocks")
    with torch.device("meta"):
        model = vit.VisionTransformer(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ClassifierError(f"{weights} belongs to another architecture: {_first_line(error)}") from error
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Classifier(model.to(where).eval(), preprocessing, classes, activation, where)


def package_digest(folder: Path) -> str:
    """sha256 of all of a package's files: of the JSON list of [path, sha256 of the content], in the paths' order.

    Raises:
        ClassifierError: something that is neither a file nor a folder.
    """
    digests = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ADDED_BY_READERS]
        for name in [*names, *(each for each in folders if (Path(place) / each).is_symlink())]:
            path = Path(place) / name
            if name in ADDED_BY_READERS:
                continue
            if path.is_symlink() or not path.is_file():
                raise ClassifierError(f"{path} is no regular file: no package is published with such")
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digests.append([path.relative_to(folder).as_posix(), content])
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


def _as_list(images: Any) -> Any:
    """Several images, whatever one or several were given as."""
    if isinstance(images, (bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if isinstance(images, np.ndarray) and images.dtype != object:
        if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4)):
            return [images]
        if images.ndim != 4:
            raise ClassifierError(
                f"one array of shape {list(images.shape)}: [images, height, width, 3] is wanted, or a list of images"
            )
    return images


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file as fp32 tensors. Eight bytes length, that much JSON, then the data: no library needed."""
    state: dict[str, torch.Tensor] = {}
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("no such file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            data = file.tell()
            left = size - data
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                dtype, shape = DTYPES[entry["dtype"]], [int(side) for side in entry["shape"]]
                if not 0 <= start <= end <= size - data or min(shape, default=0) < 0:
                    raise ValueError(f"it is cut short at {name}")
                if math.prod(shape) * dtype.itemsize != end - start:
                    raise ValueError(f"{name} has another size than shape")
                left -= end - start
                if left < 0:  # or a small file would take any memory
                    raise ValueError(f"{name} lies where another tensor does")
                file.seek(data + start)
                raw = bytearray(file.read(end - start))
                tensor = torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)
                state[name] = torch.nn.Parameter(tensor.float(), requires_grad=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ClassifierError(
            f"{path} is no complete safetensors file ({_first_line(error)}): download the package again"
        ) from error
    return state


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0] if not isinstance(error, LookupError) else f"{type(error).__name__}: {text}"
