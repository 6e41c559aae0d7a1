"""Weights: files, loading, resizing, adapting for fine-tuning, and parity with transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import scipy.ndimage
import torch
import transformers
from PIL import Image

from models.vit import VisionTransformer, VitConfig
from models.weights import (
    WeightsError,
    adapt_for_finetuning,
    from_transformers,
    load_into,
    load_safetensors,
    resize_position_embedding,
    save_safetensors,
    to_transformers,
)

SMALL = VitConfig(image_size=32, patch_size=8, width=48, depth=3, mlp_dim=96, heads=4, num_classes=7)


def randomised(config: VitConfig) -> VisionTransformer:
    """A model of which no parameter is zero, so that every one of them shows in the logits."""
    torch.manual_seed(0)
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def transformers_config(config: VitConfig) -> transformers.ViTConfig:
    return transformers.ViTConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=config.mlp_dim, image_size=config.image_size, patch_size=config.patch_size,
        num_labels=config.num_classes, layer_norm_eps=config.norm_eps,
        hidden_act={"erf": "gelu", "tanh": "gelu_pytorch_tanh"}[config.gelu],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_survive_a_file(tmp_path: Path, dtype: torch.dtype):
    state = {name: tensor.to(dtype) for name, tensor in randomised(SMALL).state_dict().items()}
    save_safetensors(state, tmp_path / "weights.safetensors")
    read = load_safetensors(tmp_path / "weights.safetensors")
    assert read.keys() == state.keys()
    assert all(read[name].dtype == dtype and torch.equal(read[name], state[name]) for name in state)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_safetensors({"a": torch.ones(3)}, path)
    shared = torch.zeros(3)
    with pytest.raises(RuntimeError):  # two names for one memory: safetensors refuses
        save_safetensors({"a": shared, "b": shared}, path)
    assert torch.equal(load_safetensors(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_unreadable_files_are_named(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(WeightsError, match=r"no weights at .*weights\.safetensors"):
        load_safetensors(path)
    save_safetensors({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load_safetensors(path)


def test_loading_names_what_differs_and_copies_nothing_then():
    model = randomised(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    state["head.weight"] = torch.zeros(9, SMALL.width)
    state["surplus"] = state.pop("norm.bias")
    with pytest.raises(WeightsError) as error:
        load_into(model, state)
    for part in ("head.weight has shape [9, 48]", "wants [7, 48]", "norm.bias is missing", "surplus is unknown"):
        assert part in str(error.value)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    with pytest.raises(WeightsError, match=r"head\.weight"):
        load_into(model, state, strict=False)
    del state["head.weight"]
    load_into(model, state, strict=False)
    assert torch.equal(model.norm.bias, before["norm.bias"])
    assert not model.pos_embed.any()


@pytest.mark.parametrize(("old", "new", "prefix"), [(14, 24, 1), (14, 7, 0), (4, 5, 1), (8, 8, 1), (1, 3, 1)])
def test_position_embedding_is_zoomed_with_order_1(old: int, new: int, prefix: int):
    rng = np.random.default_rng(0)
    pos = rng.normal(size=(1, prefix + old * old, 6)).astype(np.float32)
    grid = pos[0, prefix:].reshape(old, old, 6)
    zoomed = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1, mode="nearest")
    expected = np.concatenate([pos[0, :prefix], zoomed.reshape(-1, 6)])
    resized = resize_position_embedding(torch.from_numpy(pos), old, new, prefix)[0].numpy()
    np.testing.assert_allclose(resized, expected, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (7, 5)])
def test_position_embedding_is_resized_bicubically_as_pillow_does_with_antialias(old: int, new: int):
    grid = np.random.default_rng(0).normal(size=(old, old)).astype(np.float32)
    pos = torch.from_numpy(grid.reshape(1, -1, 1))
    expected = np.asarray(Image.fromarray(grid).resize((new, new), Image.Resampling.BICUBIC))
    resized = resize_position_embedding(pos, old, new, 0, interpolation="bicubic", antialias=True)
    np.testing.assert_allclose(resized.reshape(new, new), expected, atol=1e-5)
    plain = resize_position_embedding(pos, old, new, 0, interpolation="bicubic").reshape(new, new).numpy()
    # Keys' kernel with torch's a = -0.75 at the nearest 4 x 4 entries, those beyond the border being the outermost.
    matrix = np.zeros((new, old))
    for row, centre in enumerate((np.arange(new) + 0.5) * old / new - 0.5):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, np.clip(tap, 0, old - 1)] += near if x <= 1 else far
    np.testing.assert_allclose(plain, matrix @ grid @ matrix.T, atol=1e-5)


def test_fine_tuning_resizes_the_position_embedding_as_it_is_told():
    state = randomised(SMALL).state_dict()
    new = replace(SMALL, image_size=48)
    kinds: list[dict[str, Any]] = [
        {"interpolation": "bilinear"},
        {"interpolation": "bicubic"},
        {"interpolation": "bicubic", "antialias": True},
    ]
    found = [adapt_for_finetuning(state, SMALL, new, **kind)["pos_embed"] for kind in kinds]
    assert torch.equal(found[0], adapt_for_finetuning(state, SMALL, new)["pos_embed"])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


def test_resizing_refuses_another_grid():
    with pytest.raises(WeightsError, match="17 entries, 26 expected"):
        resize_position_embedding(torch.zeros(1, 17, 4), old_grid=5, new_grid=6)


def test_fine_tuning_starts_from_the_features_and_a_zero_head():
    old = replace(SMALL, representation_size=20, head_bias=-10.0, dropout=0.1)
    new = replace(SMALL, image_size=48, num_classes=3)
    pretrained = randomised(old).state_dict()
    model = VisionTransformer(new).eval()
    load_into(model, adapt_for_finetuning(pretrained, old, new))
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(images), torch.zeros(2, 3))
    assert model.pos_embed.shape == (1, 37, 48)
    same_size = replace(new, image_size=32)
    load_into(at_old_size := VisionTransformer(same_size).eval(), adapt_for_finetuning(pretrained, old, same_size))
    source = VisionTransformer(old).eval()
    load_into(source, pretrained)
    small_images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(at_old_size.features(small_images), source.features(small_images))


def test_fine_tuning_refuses_another_architecture():
    state = randomised(SMALL).state_dict()
    with pytest.raises(WeightsError, match=r"width: the weights have 48, this run wants 96.*pool"):
        adapt_for_finetuning(state, SMALL, replace(SMALL, width=96, pool="gap"))
    with pytest.raises(WeightsError, match="representation_size must be none"):
        adapt_for_finetuning(state, SMALL, replace(SMALL, representation_size=8))


# ----------------------------------------------------------------------------------------------------------------
# transformers: the logits of ViTForImageClassification with the same weights, to 1e-4 in fp32
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_weights_from_transformers_give_its_logits(gelu: Literal["erf", "tanh"], implementation: str):
    config = replace(SMALL, gelu=gelu, norm_eps=1e-12)
    torch.manual_seed(1)
    theirs = transformers.ViTForImageClassification._from_config(
        transformers_config(config), attn_implementation=implementation
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = VisionTransformer(config).eval()
    load_into(ours, from_transformers(theirs.state_dict()))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, got = theirs(images).logits, ours(images)
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_transformers_loads_our_weights_and_writes_them_back(tmp_path: Path):
    config = replace(SMALL, gelu="tanh")
    ours = randomised(config)
    save_safetensors(to_transformers(ours.state_dict()), tmp_path / "model.safetensors")
    transformers_config(config).save_pretrained(tmp_path)
    theirs, report = transformers.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images).logits, ours(images), atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "again")
    back = from_transformers(load_safetensors(tmp_path / "again" / "model.safetensors"))
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())


def test_the_pooler_of_transformers_is_our_representation_layer():
    config = replace(SMALL, gelu="erf", representation_size=SMALL.width)
    theirs = transformers.ViTModel(transformers_config(config)).eval()
    ours = VisionTransformer(config).eval()
    load_into(ours, from_transformers(theirs.state_dict()), strict=False)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert ours.representation is not None
        pooled = torch.tanh(ours.representation(ours.features(images)))
        torch.testing.assert_close(pooled, theirs(images).pooler_output, atol=1e-4, rtol=0)


def test_conversion_refuses_what_transformers_has_not():
    with pytest.raises(WeightsError, match="class token"):
        to_transformers(randomised(replace(SMALL, pool="gap")).state_dict())
    with pytest.raises(WeightsError, match="one-layer head"):
        to_transformers(randomised(replace(SMALL, representation_size=8)).state_dict())
    with pytest.raises(WeightsError, match="distillation_token is no parameter"):
        from_transformers({"embeddings.distillation_token": torch.zeros(1)})
