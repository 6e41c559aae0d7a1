"""A published model exported by hand, with torch's own functions as anybody would, runs at any batch size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from models.classifier import load_classifier
from models.vit import VisionTransformer, VitConfig

PACKAGE = Path(__file__).parent / "frozen" / "package"
CONFIG = VitConfig(image_size=32, patch_size=8, width=48, depth=2, mlp_dim=96, heads=4, num_classes=3)
ONNX: dict[str, dict[str, Any]] = {
    "dynamo, dynamic_shapes": {"dynamo": True, "dynamic_shapes": {"images": {0: "batch"}}},
    "dynamo, dynamic_axes": {"dynamo": True, "dynamic_axes": {"images": {0: "batch"}}},
    "script, dynamic_axes": {"dynamo": False, "dynamic_axes": {"images": {0: "batch"}, "logits": {0: "batch"}}},
}


def images(model: Any, count: int) -> torch.Tensor:
    size = model.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("pool", ["package", "cls", "gap"])
def test_a_program_of_torch_export_runs_at_any_batch_size(pool: Any):
    if pool == "package":
        model = load_classifier(PACKAGE, device="cpu").model
    else:
        torch.manual_seed(0)
        model = VisionTransformer(replace(CONFIG, pool=pool, representation_size=40, dropout=0.1, drop_path=0.1)).eval()
        torch.nn.init.normal_(model.head.weight)
    program = torch.export.export(model, (images(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 3, 8):
        given = images(model, batch)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(given), model(given))


@pytest.mark.filterwarnings("ignore")  # of the exporters themselves
@pytest.mark.parametrize("how", ONNX)
def test_a_package_as_onnx_answers_at_any_batch_size_as_it_does_itself(tmp_path: Path, how: str):
    classifier = load_classifier(PACKAGE, device="cpu")
    model = classifier.model
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(model, (images(model, 1),), str(tmp_path / "vit.onnx"), **names, **ONNX[how])
    session = onnxruntime.InferenceSession(str(tmp_path / "vit.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        given = images(model, batch)
        (logits,) = session.run(None, {"images": given.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(given), atol=1e-5, rtol=1e-4)
    files = [path.read_bytes() for path in sorted((PACKAGE.parent / "images").iterdir())][:3]
    (logits,) = session.run(None, {"images": classifier.preprocessing(files).numpy()})
    best = [classifier.classes[number] for number in logits.argmax(1)]
    assert best == [answer[0][0] for answer in classifier.classify(files)]
