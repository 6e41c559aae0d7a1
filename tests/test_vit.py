"""The architecture: sizes and costs against the paper and torch, initialisation, forward and backward."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.presets import count_parameters, forward_macs, train_flops, vit_config
from models.sizes import SIZES
from models.vit import Block, VisionTransformer, VitConfig, kernel_parameters

SMALL = VitConfig(image_size=32, patch_size=8, width=48, depth=4, mlp_dim=96, heads=4, num_classes=7)

# arXiv 2010.11929, table 1, counted out: backbone, with 1,000 and with 21,843 classes in millions; forward GMAC;
# training TFLOP an image. 224 pixels.
PUBLISHED = {
    "S/16": (21.67, 22.05, 30.08, 4.60, 0.0276),
    "B/16": (85.80, 86.57, 102.60, 17.56, 0.105),
    "L/16": (303.30, 304.33, 325.69, 61.55, 0.369),
    "H/14": (630.76, 632.05, 658.75, 167.3, 1.004),
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"pool": "gap"},
    {"representation_size": 56},
    {"channels": 1, "image_size": 48},
]


def on_meta(config: VitConfig) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name: str):
    backbone, with_1k, with_21k, gmac, train_tflop = PUBLISHED[name]
    config = vit_config(name)
    assert count_parameters(config, head=False) / 1e6 == pytest.approx(backbone, abs=0.005)
    assert count_parameters(config) / 1e6 == pytest.approx(with_1k, abs=0.005)
    assert count_parameters(vit_config(name, num_classes=21843)) / 1e6 == pytest.approx(with_21k, abs=0.005)
    assert forward_macs(config) / 1e9 == pytest.approx(gmac, rel=5e-4)
    assert train_flops(config) / 1e12 == pytest.approx(train_tflop, rel=4e-3)


@pytest.mark.parametrize(("name", "gflop"), [("g/14", 1602), ("G/14", 2902)])
def test_train_flops_of_the_giants(name: str, gflop: float):
    assert train_flops(vit_config(name)) / 1e9 == pytest.approx(gflop, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "epochs", "exaflops"),
    [("B/32", 7, 55), ("B/16", 7, 224), ("L/32", 7, 196), ("L/16", 7, 783), ("H/14", 14, 4262)],
)
def test_pretraining_compute_is_that_of_table_6(name: str, epochs: int, exaflops: float):
    jft = vit_config(name, num_classes=18_000)  # 303M images
    assert train_flops(jft) * 303e6 * epochs / 1e18 == pytest.approx(exaflops, rel=0.025)


@pytest.mark.parametrize("name", [f"{letter}/16" for letter in SIZES])
def test_closed_formulas_agree_with_torch_for_every_size(name: str):
    config = vit_config(name, pool="gap", representation_size=100)
    model = on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * forward_macs(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_formulas_agree_with_torch_for_every_option(variant: dict[str, Any]):
    config = replace(SMALL, **variant)
    model = on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    dropped = ("head.", "representation.")
    backbone = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(dropped))
    assert backbone == count_parameters(config, head=False)
    images = torch.empty(2, config.channels, config.image_size, config.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(images)
    assert counter.get_total_flops() == 2 * len(images) * forward_macs(config)
    assert logits.shape == (2, config.num_classes)
    assert model.features(images).shape == (2, config.width)


@pytest.mark.parametrize("name", ["S16", "s/16", "S/0", "S/016", "XL/16", "S/16/2", ""])
def test_unknown_names_are_refused(name: str):
    with pytest.raises(ValueError, match=r"one of Ti, S, B, L, H, g, G"):
        vit_config(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 225}, "image_size = 225 is not a multiple of patch_size = 8: 224 or 232 would do"),
        ({"image_size": 5}, "image_size = 5 .*: 8 would do"),
        ({"heads": 5}, "width = 48 does not split into heads = 5"),
        ({"pool": "max"}, "pool = 'max' must be one of 'cls', 'gap'"),
        ({"gelu": "relu"}, "gelu = 'relu'"),
        ({"dropout": 1}, "dropout = 1.0 must be at least 0 and below 1"),
        ({"drop_path": -0.1}, "drop_path = -0.1"),
        ({"depth": 0}, "depth = 0 must be at least 1"),
        ({"depth": 2.0}, "depth = 2.0 must be a whole number"),
        ({"num_classes": True}, "num_classes = True must be a whole number"),
        ({"representation_size": 0}, "representation_size = 0"),
        ({"head_bias": float("nan")}, "head_bias = nan must be a number"),
        ({"norm_eps": 0}, "norm_eps = 0.0 must be above 0"),
        ({"position_std": 0}, "position_std = 0.0 must be above 0"),
    ],
)
def test_impossible_architectures_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_configuration_as_json_is_strict():
    config = replace(SMALL, representation_size=56, head_bias=-10)
    values = config.to_json()
    assert VitConfig.from_json(values) == config
    with pytest.raises(ValueError, match=r"unknown architecture field\(s\): layers"):
        VitConfig.from_json(values | {"layers": 3})
    del values["depth"]
    with pytest.raises(ValueError, match=r"missing: depth"):
        VitConfig.from_json(values)


# ----------------------------------------------------------------------------------------------------------------
# Initialisation
# ----------------------------------------------------------------------------------------------------------------


def test_initialisation_is_that_of_the_original_code():
    torch.manual_seed(0)
    config = vit_config("Ti/16", image_size=64, representation_size=256, head_bias=-10.0)
    model = VisionTransformer(config).requires_grad_(False)
    width, block = config.width, model.blocks[3]
    assert isinstance(block, Block)
    bound = (6 / (2 * width)) ** 0.5  # Xavier uniform of a square matrix, for each of the three projections
    for projection in block.qkv.weight.chunk(3):
        assert projection.abs().max() == pytest.approx(bound, rel=1e-3)
        assert projection.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert block.fc1.weight.std() == pytest.approx((2 / (width + config.mlp_dim)) ** 0.5, rel=0.02)
    assert model.patch_embed.weight.std() == pytest.approx((1 / (3 * 16 * 16)) ** 0.5, rel=0.02)
    assert model.patch_embed.weight.abs().max() < 2.3 * (1 / (3 * 16 * 16)) ** 0.5  # truncated
    assert model.representation is not None
    assert model.representation.weight.std() == pytest.approx((1 / width) ** 0.5, rel=0.02)
    assert model.pos_embed.std() == pytest.approx(0.02, rel=0.05)
    other = VisionTransformer(replace(config, depth=1, position_std=0.05))
    assert other.pos_embed.detach().std() == pytest.approx(0.05, rel=0.05)
    assert model.cls_token is not None
    biases = [p for n, p in model.named_parameters() if n.endswith("bias") and n != "head.bias"]
    assert not any(p.any() for p in [model.cls_token, model.head.weight, *biases])
    assert torch.equal(model.head.bias, torch.full((1000,), -10.0))


def test_a_model_built_on_the_meta_device_can_be_drawn_later():
    model = on_meta(replace(SMALL, head_bias=-3.0)).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.equal(model(torch.randn(1, 3, 32, 32)), torch.full((1, 7), -3.0))


def test_weight_decay_is_for_kernels_only():
    model = VisionTransformer(replace(SMALL, representation_size=56))
    kernels = kernel_parameters(model)
    others = {name for name, _ in model.named_parameters()} - kernels
    blocks = {f"blocks.{i}.{layer}.weight" for i in range(4) for layer in ("qkv", "proj", "fc1", "fc2")}
    assert kernels == blocks | {"patch_embed.weight", "representation.weight", "head.weight"}
    assert all(name.endswith(".bias") or "norm" in name or name in ("cls_token", "pos_embed") for name in others)


# ----------------------------------------------------------------------------------------------------------------
# Forward and backward
# ----------------------------------------------------------------------------------------------------------------


def trained_a_little(config: VitConfig) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(config)
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)
    return model


def gradients(model: VisionTransformer, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(images).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_patch_embedding_is_a_convolution():
    layer = VisionTransformer(SMALL).patch_embed
    images = torch.randn(2, 3, 32, 32)
    expected = torch.nn.functional.conv2d(images, layer.weight, layer.bias, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(images), expected)


def test_every_parameter_learns():
    model = trained_a_little(replace(SMALL, representation_size=56))
    grads = gradients(model, torch.randn(4, 3, 32, 32))
    assert {name for name, grad in grads.items() if grad.any()} == {name for name, _ in model.named_parameters()}


def test_images_of_a_batch_do_not_mix():
    model = trained_a_little(replace(SMALL, pool="gap")).eval()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_gradients(drop: float):
    model = trained_a_little(replace(SMALL, dropout=drop, drop_path=drop))
    images = torch.randn(4, 3, 32, 32)
    kept = gradients(model, images)
    model.checkpoint_blocks = True
    recomputed = gradients(model, images)
    for name, grad in kept.items():
        torch.testing.assert_close(recomputed[name], grad)


def test_dropout_and_stochastic_depth_act_in_training_only():
    model = trained_a_little(replace(SMALL, dropout=0.2, drop_path=0.5))
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_stochastic_depth_skips_branches_per_image_more_often_with_depth():
    model = trained_a_little(replace(SMALL, drop_path=0.6))
    images = torch.randn(64, 3, 32, 32)
    changed: list[float] = []  # share of images that a block leaves as they are: both its branches are skipped

    def watch(_block: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        changed.append((output == inputs[0]).flatten(1).all(dim=1).float().mean().item())

    for block in model.blocks:
        block.register_forward_hook(watch)
    for _ in range(10):
        model(images)
    skipped = torch.tensor(changed).view(10, 4).mean(dim=0)
    expected = torch.tensor([0.0, 0.2, 0.4, 0.6]) ** 2
    assert skipped[0] == 0
    torch.testing.assert_close(skipped, expected, atol=0.08, rtol=0)


def test_stochastic_depth_keeps_the_expectation():
    model = VisionTransformer(replace(SMALL, drop_path=0.5))
    torch.manual_seed(0)
    scales = torch.stack(model._branch_scales(torch.empty(4000, 1, 48)))
    torch.testing.assert_close(scales.mean(dim=2), torch.ones(4, 2, 1, 1), atol=0.06, rtol=0)


def test_bf16_weights_work_and_agree():
    model = trained_a_little(SMALL).eval()
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    half = trained_a_little(SMALL).eval().to(torch.bfloat16)
    got = half(images)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in gradients(half, images).values())


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of shape \[1, 3, 40, 32\]: this model takes \[batch, 3, 32, 32\]"):
        VisionTransformer(SMALL)(torch.zeros(1, 3, 40, 32))


@pytest.mark.slow
def test_compiled_blocks_agree_and_are_compiled_once():
    torch._dynamo.reset()
    model = trained_a_little(replace(SMALL, drop_path=0.3, depth=12))
    images = torch.randn(4, 3, 32, 32)
    eager = gradients(model, images)
    model.compile_blocks()
    names = set(model.state_dict())
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = gradients(model, images)
    assert names == set(model.state_dict()) == set(eager)
    for name, grad in eager.items():
        torch.testing.assert_close(compiled[name], grad, atol=1e-4, rtol=1e-4)
