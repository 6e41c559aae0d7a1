"""The `data` section of the training stages' settings: what is read, in which order, and how it is augmented."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.settings import Settings, SettingsError, refuse_unread, since

_Color = Annotated[float, Field(ge=-1e6, le=1e6)]
Triple = tuple[_Color, _Color, _Color]


class RandAugmentSettings(Settings):
    """RandAugment (arXiv 1909.13719) as one of its sources has it; pipeline/spaces.py holds both."""

    kind: Literal["none", "big_vision", "torchvision"] = "none"
    """Whose operations and scale: big_vision's (AugReg's too; strong at 10) or torchvision's (31 bins, 0 to 30)."""
    layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Operations on each image."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 10
    """On the kind's scale. AugReg's levels are big_vision's with 2 layers, this and data.augment.mixup: light1 0, 0;
    light2 10, 0.2; medium1 15, 0.2; medium2 15, 0.5; strong1 20, 0.5; strong2 20, 0.8."""
    solarize_wraps: bool = False
    """big_vision: true compares Solarize's threshold in 8 bits as TensorFlow happens to: 256 (of magnitude 10) and 512
    (of 20) become 0 and whole images are inverted, where its code, read as numbers, inverts nothing."""

    @model_validator(mode="after")
    def _check(self) -> "RandAugmentSettings":
        section = "data.augment.randaugment"
        refuse_unread(self, section, "kind", self.kind != "none", ("layers", "magnitude"))
        refuse_unread(self, section, "kind", self.kind == "big_vision", ("solarize_wraps",))
        return self


RANDOM_CROPS = ("tensorflow", "torchvision", "inception")
"""Crops of a random area and aspect ratio."""


class AugmentSettings(Settings):
    """What is done to the training images, by numbers that depend on seed, epoch and sample alone."""

    crop: Literal["tensorflow", "torchvision", "inception", "squash", "center"] = "inception"
    """Training crop: a random area and aspect ratio as tensorflow (sample_distorted_bounding_box: the inception crop of
    ViT's code and big_vision, smaller on average) or torchvision (RandomResizedCrop; inception is its old name) draws
    them, the whole image squashed, or the centre."""
    crop_area: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest share of the image's area that a random crop takes."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333333333)
    """Smallest and largest aspect ratio (width over height) of a random crop."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    randaugment: RandAugmentSettings = RandAugmentSettings()
    randaugment_layers: Annotated[int, Field(ge=0, le=8)] = 0
    """DALI's RandAugment, which no published recipe has: operations on each image; 0 is none. See randaugment.kind."""
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 10
    """Strength of DALI's RandAugment."""
    trivialaugment: bool = False
    """TrivialAugment's wide space (arXiv 2103.10158): one operation of random strength on each image."""
    three_augment: bool = False
    """3-Augment (DeiT III, arXiv 2204.07118): each image is made gray, solarised or blurred."""
    color_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Brightness, contrast and saturation times random factors from 1 - this to 1 + this; 0 is none."""
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Random erasing (arXiv 1708.04896): chance that a rectangle of an image becomes noise; 0 is none."""
    erasing_area: tuple[float, float] = (0.02, 0.4)
    """Smallest and largest share of the image that random erasing takes (timm's recipes: 0.02 to 0.3333)."""
    erasing_aspect: tuple[float, float] = (0.3, 3.3333333333)
    """Smallest and largest aspect ratio (height over width) of the erased rectangle."""
    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Mixup (arXiv 1710.09412): both parameters of the Beta distribution of the mixing weight; 0 is none."""
    cutmix: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """CutMix (arXiv 1905.04899): the same for the share of the image that stays; with mixup, half of the steps each."""

    @property
    def changes_colors(self) -> bool:
        """Whether pipeline/pixels.py does anything to the colours."""
        return self.three_augment or self.color_jitter > 0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _check(self) -> "AugmentSettings":
        for name in ("crop_area", "crop_aspect", "erasing_area", "erasing_aspect"):
            low, high = getattr(self, name)
            share = name.endswith("area")
            most = 1 if share else 1000
            if not 0 < low <= high <= most:
                bound = f" <= {most}"
                raise SettingsError(
                    f"data.augment.{name} = [{low}, {high}] must be two numbers with 0 < least <= most{bound}"
                )
        chosen = [name for name in ("randaugment_layers", "trivialaugment", "three_augment") if getattr(self, name)]
        if self.randaugment.kind != "none":
            chosen.insert(0, "randaugment")
        if len(chosen) > 1:
            raise SettingsError(
                f"{' and '.join(f'data.augment.{name}' for name in chosen)} are alternatives: keep one of them"
            )
        refuse_unread(self, "data.augment", "crop", self.crop in RANDOM_CROPS, ("crop_area", "crop_aspect"))
        refuse_unread(
            self, "data.augment", "randaugment_layers", self.randaugment_layers > 0, ("randaugment_magnitude",)
        )
        refuse_unread(self, "data.augment", "erasing", self.erasing > 0, ("erasing_area", "erasing_aspect"))
        return self


class MixturePart(Settings):
    """One of several corpora that are mixed."""

    corpus: str
    """Folder of a corpus made by data_prep/shard.py, or s3://."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """How often its images come, in relation to the other weights."""
    name: str | None = None
    """What to call it where classes are kept apart; null takes the folder's name."""


class DataSettings(Settings):
    """What is read, in which order, and what is done to the images."""

    corpus: str | None = None
    """Folder of a corpus made by data_prep/shard.py, or s3://."""
    mixture: tuple[MixturePart, ...] | None = None
    """Instead of data.corpus, several to mix: [{corpus: /data/a, weight: 0.7}, {corpus: /data/b, weight: 0.3}]."""
    mixture_classes: Literal["merge", "separate"] = "merge"
    """Classes of the same name are one, numbered as they first appear, or each part keeps its own as PART:CLASS."""
    heldout: str | None = None
    """Corpus that is scored during and after training; it must have the same classes."""
    image_size: Annotated[int, Field(gt=0, le=1 << 14)] = 224
    """Resolution in pixels (square). Must be a multiple of the patch size."""
    augment: AugmentSettings = AugmentSettings()
    eval_resize: Annotated[int, Field(gt=0, le=1 << 15)] | None = None
    """Evaluation and consumers: shorter side in pixels before the centre crop; null squashes the whole image. Another
    image_size on the command line takes it along, as the recipe's ratio of the two."""
    train_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How training crops are resized; bicubic in the recipes of DeiT and timm."""
    train_antialias: bool = True
    """Whether the filter of a reduced training crop is as wide as the reduction; false as in TensorFlow's recipes."""
    eval_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How evaluation and consumers resize."""
    eval_antialias: bool = True
    """As train_antialias, for evaluation and consumers."""
    mean: Triple | None = None
    """Subtracted from the pixels, scaled to 0 to 1, by channel. Null: the parent's, or 0.5 as in the original code."""
    std: Triple | None = None
    """The pixels are then divided by this, by channel. Null: the parent's, or 0.5."""
    shuffle_window: Annotated[int, Field(ge=0)] | None = None
    """0 shuffles all images; W shuffles whole shards, then inside windows of W. Null: 0 on disks, a W for s3://."""
    cache_gb: Annotated[float, Field(gt=0, le=1e9)] = 100.0
    """What shards from s3:// may take on a node, in $VITFORGE_CACHE or ~/.cache/vitforge; at most 80 % of the disk."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of images that may be unreadable; they are replaced and counted. More (and more than 10) stop the run."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes; auto tries the GPU in a subprocess first and falls back to the CPU."""
    hw_decoder_load: Annotated[float, Field(ge=0, le=1)] = 0.65
    """Share of the JPEGs that goes to a GPU's hardware decoder, if it has one (DALI's default); try what is fastest."""
    decode_threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    """DALI's threads a rank; null shares the node's cores among its ranks."""
    rules: Literal[1, 2] = since(2, absent=1)
    """How images become pixels and how chances are drawn, to the last digit: 2, or 1 as runs began until November 2026.

    A run keeps the one that it began with. Set it to 1 only to repeat a run of that time.
    """

    @classmethod
    def follow(cls, recipe: Mapping[str, Any], values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        """See `Settings.follow`: eval_resize follows image_size."""
        if "image_size" not in given or "eval_resize" in given:
            return {}
        default = cls.model_fields["image_size"].default
        resize, was, now = (
            recipe.get("eval_resize"),
            recipe.get("image_size", default),
            values.get("image_size", default),
        )
        if not all(type(number) is int and 0 < number < 1 << 20 for number in (resize, was, now)) or was == now:
            return {}
        return {"eval_resize": round(resize * now / was)}

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if (self.corpus is None) == (self.mixture is None):
            given = "neither is" if self.corpus is None else "both are"
            raise SettingsError(
                f"data.corpus or data.mixture must be set, {given}: give the folder of a corpus, or several with "
                "weights (data.corpus=null takes one out of a recipe)"
            )
        if self.mixture is not None and len(self.mixture) == 0:
            raise SettingsError("data.mixture = [] must have at least one part: {corpus: FOLDER, weight: NUMBER}")
        refuse_unread(self, "data", "mixture", self.mixture is not None, ("mixture_classes",))
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise SettingsError(
                f"data.eval_resize = {self.eval_resize} is below data.image_size = {self.image_size}: the centre "
                f"crop would not fit; {round(self.image_size * 8 / 7)} is usual"
            )
        if self.std is not None and min(self.std) <= 0:
            raise SettingsError(f"data.std = {list(self.std)} must be positive")
        refuse_unread(self, "data", "decode", self.decode != "cpu", ("hw_decoder_load",))
        return self
