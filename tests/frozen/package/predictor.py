"""The face of a model package: what `mlflow.pyfunc.load_model` loads, at the consumer's side.

MLflow copies this file into the package and runs it there ("models from code"; nothing is pickled). It imports
torch, numpy, pandas and mlflow, and nothing of this project: the architecture and the preprocessing lie beside it in
the package and are loaded under module names made from their content. A consumer's own modules called `models` or
`pipeline` are therefore never touched, and packages of different versions work side by side in one process.
"""

import base64
import binascii
import hashlib
import importlib.util
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow.exceptions import MlflowException

FORMAT_VERSION = 1
"""Of model.json. A reader refuses a newer one."""

BATCH = 64
"""Images that go through the model at once."""

_loading = threading.Lock()


class VitPredictor(mlflow.pyfunc.PythonModel):
    """Images in, class names and probabilities out, on the GPU if there is one.

    `predict` (MLflow's, which applies the signature) takes the column `image` of a DataFrame, a dict or a list of
    dicts, holding encoded images (bytes; base64 text over HTTP) or uint8 arrays [H, W, 3]; and the parameter
    `top_k`. `unwrap_python_model().classify(images, top_k)` takes a plain list of either, or one array [B, H, W, 3],
    which MLflow lets no column signature take.
    """

    def load_context(self, context: Any) -> None:
        """Build the model from the package's artifacts."""
        artifacts = {name: Path(path) for name, path in context.artifacts.items()}
        description = json.loads(artifacts["model"].read_text())
        version = description["format_version"]
        if version > FORMAT_VERSION:
            raise MlflowException.invalid_parameter_value(
                f"package format {version} is newer than the {FORMAT_VERSION} that this predictor reads"
            )
        vit = _load_module(artifacts["code"] / "vit.py")
        preprocess = _load_module(artifacts["code"] / "preprocess.py")
        self.classes: list[str] = description["classes"]
        self.activation: str = description["activation"]
        self.preprocessing = preprocess.Preprocessing.from_json(description["preprocessing"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = vit.VisionTransformer(vit.VitConfig.from_json(description["architecture"]))
        model.load_state_dict(_read_safetensors(artifacts["weights"]), assign=True)
        self.model = model.to(self.device).eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """See the class and `classify`."""
        images = [_undo_json(image) for image in model_input["image"]]
        return self.classify(images, (params or {}).get("top_k")).set_index(model_input.index)

    def classify(self, images: Sequence[Any] | npt.NDArray[np.uint8], top_k: int | None = None) -> pd.DataFrame:
        """The `top_k` most probable classes of each image, most probable first.

        Args:
            images: encoded images and uint8 arrays [H, W, 3], or one array [B, H, W, 3].
            top_k: 1 to the number of classes; None: 5, or all if there are fewer.

        Returns:
            A row an image, with the lists `classes` (names) and `probabilities`.

        Raises:
            MlflowException: an image that cannot be read (it says which one and why), or a `top_k` out of range.
        """
        if top_k is None:
            top_k = min(5, len(self.classes))
        if not 1 <= top_k <= len(self.classes):
            raise MlflowException.invalid_parameter_value(
                f"top_k = {top_k}: the model has {len(self.classes)} classes, 1 to {len(self.classes)} would do"
            )
        classes: list[list[str]] = []
        probabilities: list[list[float]] = []
        for start in range(0, len(images), BATCH):
            best = self._probabilities(images[start : start + BATCH], start).topk(top_k, dim=1)
            classes += [[self.classes[index] for index in row] for row in best.indices.tolist()]
            probabilities += best.values.tolist()
        return pd.DataFrame({"classes": classes, "probabilities": probabilities})

    @torch.inference_mode()
    def _probabilities(self, images: Any, offset: int) -> torch.Tensor:
        """[B, classes], fp32, on the CPU."""
        try:
            pixels = self.preprocessing(images)
        except ValueError as error:
            place = f" (in the batch that starts at row {offset})" if offset else ""
            raise MlflowException.invalid_parameter_value(f"{error}{place}") from error
        logits = self.model(pixels.to(self.device)).float()
        return (logits.softmax(dim=1) if self.activation == "softmax" else logits.sigmoid()).cpu()


def _undo_json(image: Any) -> Any:
    """Bytes or an array from what JSON makes of them: base64 text, nested lists."""
    if isinstance(image, list):
        array = np.asarray(image)
        fits = array.ndim == 3 and array.dtype.kind == "i" and array.min() >= 0 and array.max() <= 255
        return array.astype(np.uint8) if fits else array
    if isinstance(image, (str, bytes)):
        # The scoring server decodes base64 in dataframe_split and dataframe_records, but not in inputs and
        # instances. No image format consists of base64's characters alone, so that it is safe to try.
        try:
            return base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            return image
    return image


def _load_module(path: Path) -> ModuleType:
    """The module in `path`, under a name made from its content: the same code is loaded once, other code beside it."""
    source = path.read_bytes()
    name = f"vitforge_{path.stem}_{hashlib.sha256(source).hexdigest()[:24]}"
    with _loading:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # dataclasses look their module up while it is being run
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
    return sys.modules[name]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file as fp32 tensors. Eight bytes length, that much JSON, then the data: no library needed."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    state: dict[str, torch.Tensor] = {}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        data = file.tell()
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(data + start)
            raw = bytearray(file.read(end - start))
            if len(raw) != end - start:
                raise MlflowException(f"{path} is cut short at {name}: download the package again")
            tensor = torch.frombuffer(raw, dtype=dtypes[entry["dtype"]]).view(entry["shape"])
            state[name] = torch.nn.Parameter(tensor.float(), requires_grad=False)
    return state


mlflow.models.set_model(VitPredictor())
