"""What a stage is about to do, in one line, and what a person should know of it before it takes hours."""

import math

from cluster.command import log
from data_prep.mixture import Mixture
from models.presets import count_parameters, forward_macs, train_flops
from models.sizes import SIZES, Size
from models.vit import VitConfig
from pipeline.config import StageSettings, duration_in_steps

MOST_EPOCHS = {
    "pretrain": (300, "its pre-training on ImageNet-1k, table 3"),
    "finetune": (125, "its fine-tuning on Oxford Flowers-102, 500 steps of 512 on 2,040 images, table 4"),
}
"""The most passes over the images that "An Image is Worth 16x16 Words" (arXiv 2010.11929) makes, and where. On ImageNet
its fine-tuning makes 8, on Oxford-IIIT Pets 70, on CIFAR 102."""


def describe(settings: StageSettings, architecture: VitConfig, corpus: Mixture) -> str:
    """One line: model, parameters, operations an image, classes, images, length."""
    training, images = settings.training, corpus.num_samples
    total = duration_in_steps(training.duration, training.global_batch, images)
    epochs = total * training.global_batch / images
    an_epoch = images / training.global_batch
    steps = f"{total:,} step{'s' if total != 1 else ''}"
    if epochs >= 1:
        length = f"{_rounded(epochs)} epochs of {_rounded(an_epoch)} steps: {steps} of {training.global_batch:,} images"
    else:
        length = f"{steps} of {training.global_batch:,} images: {_rounded(epochs)} of an epoch"
    forward, both = _scaled(2 * forward_macs(architecture)), _scaled(train_flops(architecture))
    return (
        f"{model_name(architecture)} at {architecture.image_size} px: {_scaled(count_parameters(architecture))} "
        f"parameters, {forward}FLOPs an image ({both}FLOPs to train on it); "
        f"{len(corpus.classes):,} classes, {images:,} images, {length}"
    )


def model_name(architecture: VitConfig) -> str:
    """ViT-S/16, or the numbers of an architecture that has no name."""
    size = Size(architecture.width, architecture.depth, architecture.mlp_dim, architecture.heads)
    names = [name for name, known in SIZES.items() if known == size]
    if names:
        return f"ViT-{names[0]}/{architecture.patch_size}"
    return f"ViT of {size.depth} blocks of width {size.width} on patches of {architecture.patch_size} px"


def tell(stage: str, settings: StageSettings, architecture: VitConfig, corpus: Mixture) -> None:
    """Log the line, and warnings: of more passes over the images than are known to help, and of no held-out set."""
    log.info("%s", describe(settings, architecture, corpus))
    training = settings.training
    total = duration_in_steps(training.duration, training.global_batch, corpus.num_samples)
    epochs = total * training.global_batch / corpus.num_samples
    most, where = MOST_EPOCHS[stage]
    if epochs > most + 0.5:
        log.warning(
            "training.duration = %s is %s passes over the %s images of %s, more than the paper makes anywhere (%d: "
            '%s): the model may learn them by heart. training.duration="%d epochs" would be as many',
            training.duration, _rounded(epochs), f"{corpus.num_samples:,}", corpus, most, where, most,
        )  # fmt: skip
    if settings.data.heldout is None:
        log.warning(
            "no images are held out, so nothing will show how good the model is on others: `python data_prep/subset.py "
            "%s DESTINATION holdout=0.1` makes a split, then give data.corpus=DESTINATION/train and "
            "data.heldout=DESTINATION/heldout",
            settings.data.corpus or "CORPUS",
        )


def _rounded(value: float) -> str:
    """A number as people say it: whole from 10 on, else with as many decimals as tell something."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def _scaled(value: int) -> str:
    """22.1 M, 4.6 G: three digits."""
    power = min(int(math.log10(max(value * 1.0005, 1)) // 3), 4)  # 999,900 k is 1.0 M
    number = value / 1000**power
    decimals = 0 if number >= 99.95 else 1
    return f"{number:.{decimals}f} {['', 'k', 'M', 'G', 'T'][power]}"
