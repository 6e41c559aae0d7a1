"""The training loop on real DeepSpeed: world sizes agree, a killed run resumes exactly, bad states are refused."""

import json
import shutil

import pytest
import torch

from cluster.folders import LocalFolder
from models.vit import VisionTransformer, VitConfig
from pipeline import tracking
from pipeline.checkpoints import newest
from pipeline.packages import load_package
from tests.corpora import image_folder, make_corpus
from tests.running import losses, newest_state, tiny, torchrun, torchrun_killed

STEPS = 50
TINY = [*tiny(STEPS, 10), "run.workers=null"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    corpus = make_corpus(image_folder(root / "images", classes=3, images=20), root / "corpus")
    other = make_corpus(image_folder(root / "others", classes=3, images=21), root / "other")
    return root / "home", corpus.path, other.path


def words(places, name, *overrides):
    return [*TINY, f"data.corpus={places[1]}", f"run.name={name}", *overrides]


def run(places, name, ranks, *overrides):
    """The losses of a run that ends well."""
    done = torchrun(ranks, places[0], *words(places, name, *overrides))
    assert done.returncode == 0, done.stderr[:6000]
    return losses(places[0] / "runs" / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def two_ranks(places):
    return run(places, "two", 2, "training.zero_stage=2", "data.augment.mixup=0.2")


def test_one_rank_and_two_agree_on_the_loss_of_every_step(places, two_ranks):
    one = run(places, "one", 1, "training.zero_stage=0", "training.micro_batch=6", "data.augment.mixup=0.2")
    assert sorted(one) == sorted(two_ranks) == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        assert one[step] == pytest.approx(two_ranks[step], rel=1e-4), step
    assert one[1] == pytest.approx(two_ranks[1], rel=1e-6)


def test_a_run_killed_half_way_goes_on_with_identical_losses(places, two_ranks):
    name, overrides = "killed", ("training.zero_stage=2", "data.augment.mixup=0.2")
    metrics = places[0] / "runs" / name / "metrics.jsonl"
    last = torchrun_killed(2, places[0], metrics, 25, *words(places, name, *overrides))
    assert 25 <= last < STEPS
    assert run(places, name, 2, *overrides) == two_ranks
    steps = [row["step"] for row in tracking.metrics_of(LocalFolder(metrics.parent))]
    assert steps == sorted(set(steps))  # no step stands twice
    folder = places[0] / "runs" / name / "checkpoints"
    assert sorted(path.name[:13] for path in folder.iterdir()) == ["step-00000040", "step-00000050"]


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(places, two_ranks):
    home = places[0]
    shutil.copytree(home / "runs" / "two", home / "runs" / "damaged")
    (home / "runs" / "damaged" / "run.json").unlink()
    part = next((home / "runs" / "damaged" / "checkpoints").glob("step-00000050-*/rank-00001.bin"))
    part.write_bytes(part.read_bytes()[:-100])
    done = torchrun(2, home, *words(places, "damaged", "training.zero_stage=2", "data.augment.mixup=0.2"))
    assert done.returncode == 0, done.stderr[:6000]
    assert part.name in done.stderr
    assert "falling back" in done.stderr
    assert "resumed from" in done.stderr
    assert losses(home / "runs" / "damaged" / "metrics.jsonl") == two_ranks


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.learning_rate=1e-4"], "optimizer.learning_rate was 0.002, is 0.0001"),
        (["model.width=64", "model.heads=4"], "another architecture"),
        (["training.global_batch=24"], "training.global_batch = 12, this run has 24"),
        (["data.corpus=OTHER"], "another corpus"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(places, two_ranks, overrides, message):
    overrides = [word.replace("OTHER", str(places[2])) for word in overrides]
    before = (places[0] / "runs" / "two" / "metrics.jsonl").read_bytes()
    done = torchrun(
        1, places[0], *words(places, "two", "data.augment.mixup=0.2", "training.duration=60 steps", *overrides)
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert (places[0] / "runs" / "two" / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_with_step_rank_and_samples(places):
    done = torchrun(
        2,
        places[0],
        *words(places, "diverged", "optimizer.learning_rate=1e14", "optimizer.gradient_clipping=0.0"),
        "optimizer.weight_decay=0",  # step 3 multiplies three weights of 1e13, which is too much for fp32
    )
    assert done.returncode != 0
    assert "the loss became" in done.stderr, done.stderr[:5000]
    assert "on rank" in done.stderr
    assert "samples [" in done.stderr


def test_bf16_begins_with_the_fp32_weights_and_the_result_names_both_rates(places):
    name = "bf16-begins"
    still = ("optimizer.learning_rate=1e-30", "optimizer.warmup=0 steps", "training.duration=3 steps")
    run(
        places,
        name,
        2,
        *still,
        "training.precision=bf16",
        "training.zero_stage=2",
        "training.ema=0.5",
        "training.seed=3",
    )
    folder = places[0] / "runs" / name
    checkpoint = newest(LocalFolder(folder / "checkpoints"))
    assert checkpoint is not None
    torch.manual_seed(3)
    drawn = VisionTransformer(VitConfig.from_json(checkpoint.state["architecture"])).state_dict()
    state = newest_state(folder / "checkpoints")
    for parameter, numbers in drawn.items():
        for kind in ("weight", "ema"):  # to the last bit, but for the updates, which are of 1e-30
            torch.testing.assert_close(state[f"{parameter} {kind}"], numbers, rtol=0, atol=1e-28)
    result = json.loads((folder / "result.json").read_text())
    spent = checkpoint.state["throughput"]
    assert spent["images"] == 3 * 12
    assert result["images_per_second_overall"] == pytest.approx(36 / spent["seconds"])
    assert result["images_per_second"] == result["images_per_second_training"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_keeps_fp32_master_weights_through_resume_and_hand_over(places, two_ranks, stage):
    name = f"bf16-stage{stage}"
    overrides = (f"training.zero_stage={stage}", "training.precision=bf16", "data.augment.mixup=0.2")
    metrics = places[0] / "runs" / name / "metrics.jsonl"
    torchrun_killed(2, places[0], metrics, 25, *words(places, name, *overrides, f"registry.name={name}"))
    bf16 = run(places, name, 2, *overrides, f"registry.name={name}")
    straight = run(places, name + "-straight", 2, *overrides)
    assert bf16 == straight
    assert bf16[1] == pytest.approx(two_ranks[1], rel=1e-2)
    assert bf16[STEPS] == pytest.approx(two_ranks[STEPS], rel=5e-2)
    tracking.connect(places[0])
    state = load_package(f"models:/{name}/1").state
    kernel = state["blocks.0.fc1.weight"]
    assert (kernel != kernel.bfloat16().float()).float().mean() > 0.5  # finer than bf16 can say


@pytest.mark.slow
def test_dropout_sigmoid_and_accumulation_resume_too(places):
    overrides = (
        "training.zero_stage=1", "model.dropout=0.1", "model.drop_path=0.2", "loss.kind=sigmoid",
        "training.micro_batch=2",
        "optimizer.schedule=rsqrt", "optimizer.cooldown=10 steps", "data.augment.randaugment_layers=1",
    )  # fmt: skip
    straight = run(places, "rich", 2, *overrides)
    metrics = places[0] / "runs" / "rich-killed" / "metrics.jsonl"
    torchrun_killed(2, places[0], metrics, 25, *words(places, "rich-killed", *overrides))
    assert run(places, "rich-killed", 2, *overrides) == straight
