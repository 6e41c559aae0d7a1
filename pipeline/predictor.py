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
import inspect
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

OUTPUTS = ("top_k", "label", "index")
"""What `model_config={"output": ...}` may say; the first is the default."""
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_TAKES = (
    "Give the column `image`, of each image the encoded file's bytes as base64 text, as a data URI "
    '(data:image/jpeg;base64,...) or as {"b64": BASE64}, or its values 0 to 255 as lists [height, width, 3]: '
    '{"dataframe_records": [{"image": ...}]}, {"instances": [{"image": ...}]} or {"inputs": {"image": [...]}}'
)
"""Of a request's refusal."""

_loading = threading.Lock()


class VitPredictor(mlflow.pyfunc.PythonModel):
    """Images in, class names and probabilities out, on the GPU if there is one.

    `predict` (MLflow's, which applies the signature) takes the column `image` of a DataFrame, a dict of lists or a list
    of dicts, and the parameter `top_k`. An image is one of

    - an encoded image (JPEG, PNG, WebP and what else Pillow reads) as bytes; as base64 text, of the standard or the
      URL-safe alphabet, with or without line breaks; as a data URI (`data:image/jpeg;base64,...`); or as
      `{"b64": BASE64}`, as TensorFlow Serving and KServe have it
    - uint8 values [height, width, 3] (or [h, w], [h, w, 1], [h, w, 4]) as an array or, over HTTP, as nested lists
    - a `PIL.Image.Image`, in this process

    Over HTTP (`mlflow models serve`, POST /invocations) the column is called `image` in dataframe_split,
    dataframe_records, inputs and instances; `{"inputs": [IMAGE, ...]}` and `{"instances": [IMAGE, ...]}` do without a
    name for images as text and as nested lists. `{"instances": [{"b64": ...}]}` alone is refused: MLflow takes b64 for
    the name of a column; `{"instances": [{"image": {"b64": ...}}]}` is right. An image [height, width, 3] alone is
    given as a list of one.

    `unwrap_python_model().classify(images, top_k)` takes a plain list of images, or one array [B, H, W, 3], which
    MLflow lets no column signature take, or a single image.

    The answer is a row an image, with the lists `classes` and `probabilities`. Where a tool wants one value an image,
    `load_model(URI, model_config={"output": "label"})` gives the most probable class's name, "index" its number.
    `mlflow.models.evaluate(URI, data, targets=..., model_type="classifier")` gets names without being told.
    """

    def load_context(self, context: Any) -> None:
        """Build the model from the package's artifacts."""
        artifacts = {name: Path(path) for name, path in context.artifacts.items()}
        vit, preprocess, classifier = (
            _load_module(artifacts["code"] / f"{name}.py") for name in ("vit", "preprocess", "classifier")
        )
        self.output = (context.model_config or {}).get("output", OUTPUTS[0])
        if self.output not in OUTPUTS:
            raise MlflowException.invalid_parameter_value(
                f"model_config: output = {self.output!r} must be one of {', '.join(map(repr, OUTPUTS))}"
            )
        try:
            self.classifier = classifier.read_classifier(artifacts["model"], artifacts["weights"], vit, preprocess)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame | pd.Series:
        """See the class and `classify`."""
        if "image" not in model_input:
            raise MlflowException.invalid_parameter_value(f"the request has no column `image`. {_TAKES}")
        given, index = list(model_input["image"]), model_input.index
        if len(given) == 1 and _holds_images(given[0]):  # {"image": [TEXT, TEXT]} is one row to MLflow
            given, index = given[0], pd.RangeIndex(len(given[0]))
        images = [_undo_json(image, row) for row, image in enumerate(given)]
        output = "label" if self.output == OUTPUTS[0] and _asked_by_evaluator() else self.output
        if output == OUTPUTS[0]:
            return self.classify(images, (params or {}).get("top_k")).set_index(index)
        best = [names[0] for names in self.classify(images, 1)["classes"]]
        if output == "index":
            return pd.Series([self.classifier.classes.index(name) for name in best], index, name="index")
        return pd.Series(best, index, dtype=object, name="label")

    def classify(self, images: Sequence[Any] | npt.NDArray[np.uint8], top_k: int | None = None) -> pd.DataFrame:
        """The `top_k` most probable classes of each image, most probable first.

        Args:
            images: encoded images (bytes), uint8 arrays [H, W, 3] and PIL images; one array [B, H, W, 3]; or a single
                image.
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


def _asked_by_evaluator() -> bool:
    """Whether `mlflow.models.evaluate` of this process asks.

    Its evaluator of classifiers (MLflow 3.17) takes one column of names, no table, and passes no parameters: it could
    be told by `model_config` alone, which nobody would know of.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("mlflow.models.evaluation."):
            return True
        frame = frame.f_back
    return False


def _holds_images(value: Any) -> bool:
    """Whether what stands for one image is several, as text or as objects."""
    return isinstance(value, (list, np.ndarray)) and len(value) > 0 and isinstance(value[0], (str, bytes, dict))


def _undo_json(image: Any, row: int) -> Any:
    """Bytes or an array from what JSON makes of them."""
    if isinstance(image, dict):
        if set(image) != {"b64"} or not isinstance(image["b64"], (str, bytes)):
            raise MlflowException.invalid_parameter_value(
                f"image {row}: an object with {', '.join(map(str, image))[:80] or 'nothing'} in it. {_TAKES}"
            )
        image = image["b64"]
    if isinstance(image, list):
        image = _undo_lists(image, row)
    if isinstance(image, np.ndarray) and image.ndim == 2 and image.shape[1] in (3, 4):
        raise MlflowException.invalid_parameter_value(
            f"an array of shape {list(image.shape)} looks like one row of an image: an image [height, width, 3] that "
            "is given alone is taken apart into its rows; give a list of one"
        )
    if isinstance(image, (str, bytes)):
        return _undo_text(image, row)
    return image


def _undo_lists(image: list[Any], row: int) -> npt.NDArray[Any]:
    """Nested lists as an array, of uint8 where they hold such."""
    try:
        array = np.asarray(image)
    except ValueError as error:  # rows of unequal length
        raise MlflowException.invalid_parameter_value(f"image {row}: lists of unequal length. {_TAKES}") from error
    fits = array.ndim in (2, 3) and array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() <= 255
    return array.astype(np.uint8) if fits else array


def _undo_text(image: str | bytes, row: int) -> bytes:
    """An encoded image from base64 or a data URI; what is one already stays.

    No image format consists of base64's characters and line breaks alone, but for the plain-text ones (P1, P2 and P3
    and a white space), so that it is safe to try.
    """
    text = image.encode("utf-8", "surrogatepass") if isinstance(image, str) else image
    if re.match(rb"P[123]\s", text):
        return text
    uri = re.match(rb"\s*data:[^,]{0,200};base64,", text, re.IGNORECASE)
    joined = b"".join(text[uri.end() if uri else 0 :].split())
    if isinstance(image, str):
        joined = joined.translate(_URL_SAFE)
        joined += b"=" * (-len(joined) % 4)  # some leave out what only fills up the last group
    try:
        return base64.b64decode(joined, validate=True)
    except (binascii.Error, ValueError):
        if isinstance(image, bytes):
            return image
        raise MlflowException.invalid_parameter_value(
            f"image {row}: a text that is no base64 ({image[:60]!r}); files and addresses are not opened. {_TAKES}"
        ) from None


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
