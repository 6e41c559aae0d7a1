"""The face of a model package: what `mlflow.pyfunc.load_model` loads, at the consumer's side.

MLflow copies this file into the package and runs it there ("models from code"; nothing is pickled). It imports
torch, numpy, pandas and mlflow, and nothing of this project: the architecture, the preprocessing and what makes
answers of them lie beside it in the package and are loaded under module names made from their content. A consumer's
own modules called `models` or `pipeline` are therefore never touched, and packages of different versions work side by
side in one process.
"""

import base64
import binascii
import hashlib
import importlib.machinery
import importlib.util
import re
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
from mlflow.exceptions import MlflowException

_loading = threading.Lock()


class VitPredictor(mlflow.pyfunc.PythonModel):
    """Images in, class names and probabilities out, on the GPU if there is one.

    `predict` (MLflow's, which applies the signature) takes the column `image` of a DataFrame, a dict or a list of
    dicts, holding encoded images (bytes; base64 text over HTTP) or uint8 arrays [H, W, 3]; and the parameter
    `top_k`. `unwrap_python_model().classify(images, top_k)` takes a plain list of either, or one array [B, H, W, 3],
    which MLflow lets no column signature take, or a single image.
    """

    def load_context(self, context: Any) -> None:
        """Build the model from the package's artifacts."""
        artifacts = {name: Path(path) for name, path in context.artifacts.items()}
        vit, preprocess, classifier = (
            _load_module(artifacts["code"] / f"{name}.py") for name in ("vit", "preprocess", "classifier")
        )
        try:
            self.classifier = classifier.read_classifier(artifacts["model"], artifacts["weights"], vit, preprocess)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """See the class and `classify`."""
        images = [_undo_json(image) for image in model_input["image"]]
        return self.classify(images, (params or {}).get("top_k")).set_index(model_input.index)

    def classify(self, images: Sequence[Any] | npt.NDArray[np.uint8], top_k: int | None = None) -> pd.DataFrame:
        """The `top_k` most probable classes of each image, most probable first.

        Args:
            images: encoded images and uint8 arrays [H, W, 3]; one array [B, H, W, 3]; or a single image.
            top_k: 1 to the number of classes; None: 5, or all if there are fewer.

        Returns:
            A row an image, with the lists `classes` (names) and `probabilities`.

        Raises:
            MlflowException: an image that cannot be read (it says which one and why), or a `top_k` out of range.
        """
        try:
            answers = self.classifier.classify(images, top_k)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(
            {
                "classes": [[name for name, _ in answer] for answer in answers],
                "probabilities": [[value for _, value in answer] for answer in answers],
            }
        )


def _undo_json(image: Any) -> Any:
    """Bytes or an array from what JSON makes of them: base64 text, nested lists."""
    if isinstance(image, list):
        array = np.asarray(image)
        fits = array.ndim in (2, 3) and array.dtype.kind == "i" and array.min() >= 0 and array.max() <= 255
        image = array.astype(np.uint8) if fits else array
    if isinstance(image, np.ndarray) and image.ndim == 2 and image.shape[1] in (3, 4):
        raise MlflowException.invalid_parameter_value(
            f"an array of shape {list(image.shape)} looks like one row of an image: an image [height, width, 3] that "
            "is given alone is taken apart into its rows; give a list of one"
        )
    if isinstance(image, (str, bytes)):
        # The scoring server decodes base64 in dataframe_split and dataframe_records, but not in inputs and
        # instances. No image format consists of base64's characters and line breaks alone, but for the plain-text
        # ones (P1, P2 and P3 and a white space), so that it is safe to try.
        text = image.encode() if isinstance(image, str) else image
        if re.match(rb"P[123]\s", text):
            return text
        try:
            return base64.b64decode(b"".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            return image
    return image


def _load_module(path: Path) -> ModuleType:
    """The module in `path`, under a name made from its content: the same code is loaded once, other code beside it.

    What is run is what was read: no compiled file that lies beside it, and none is left there.
    """
    source = path.read_bytes()
    name = f"vitforge_{path.stem}_{hashlib.sha256(source).hexdigest()[:24]}"
    with _loading:
        if name not in sys.modules:
            spec = importlib.machinery.ModuleSpec(name, None, origin=str(path))
            module = importlib.util.module_from_spec(spec)
            module.__file__ = str(path)
            sys.modules[name] = module  # dataclasses look their module up while it is being run
            try:
                exec(compile(source, str(path), "exec"), module.__dict__)
            except BaseException:
                del sys.modules[name]
                raise
    return sys.modules[name]


mlflow.models.set_model(VitPredictor())
