"""Run under torchrun by tests/test_elastic.py: trains a small ViT on made-up images, saves it, loads it elsewhere.

Every step's global batch is a function of the step alone, whatever the ranks. Results go to standard output of rank
0, a JSON object a line.
"""

import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from cluster.folders import LocalFolder
from models.losses import dense_targets, softmax_cross_entropy
from models.vit import VisionTransformer, VitConfig
from pipeline import workers
from pipeline.config import CheckpointSettings, OptimizerSettings
from pipeline.elastic import begin_with, holdings, swap_average
from pipeline.engine import (
    build_engine,
    nonfinite_flag,
    prepare_deepspeed,
    reduce_and_update,
    set_learning_rate,
)
from pipeline.layout import Layout
from pipeline.optimizer import averaging_decay
from pipeline.saving import Checkpoints

CONFIG = VitConfig(image_size=8, patch_size=4, width=16, depth=2, mlp_dim=20, heads=2, num_classes=3)
GLOBAL_BATCH = 8
EMA = 0.9


def make_engine(worker, stage, *, precision="fp32", accumulation=1, kind="adamw", seed=0, recompute=False):
    torch.manual_seed(seed)
    share = GLOBAL_BATCH // worker.world_size
    layout = Layout(precision, share // accumulation, accumulation, stage, False, recompute)
    options = {"weight_decay": 0.3, "kind": kind, "learning_rate": 0.05}
    model = VisionTransformer(CONFIG)
    return build_engine(model, OptimizerSettings(**options), layout, GLOBAL_BATCH, worker, averages=True), layout


def train(engine, layout, worker, first, last, poison=None):
    """Takes the steps first, ..., last - 1; returns the mean loss of each over the global batch, before its update."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 3, (GLOBAL_BATCH,), generator=generator)
        set_learning_rate(engine, 0.01 * (step + 1), averaging_decay(EMA, step))
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(layout.accumulation):
            begin = worker.rank * layout.micro_batch * layout.accumulation + micro * layout.micro_batch
            some = slice(begin, begin + layout.micro_batch)
            rows = torch.arange(layout.micro_batch)
            targets = dense_targets(rows.numpy(), labels[some].numpy(), torch.ones(len(rows)).numpy(), len(rows), 3,
                                    worker.device)  # fmt: skip
            loss = softmax_cross_entropy(engine(images[some].to(layout.dtype)), targets, 0.0)
            if step == poison and worker.rank == worker.world_size - 1:
                loss = loss * float("nan")
            total += loss.detach().double() / layout.accumulation
            engine.backward(loss)
            reduce_and_update(engine, measure=True)
        dist.all_reduce(total)
        losses.append(float(total) / worker.world_size)
    return losses


def whole_state(engine):
    """Every state of every parameter put together from all ranks: {"NAME STATE": numbers}."""
    held = holdings(engine)
    mine = [
        (f"{piece.name} {state}", piece.start, flat[piece.offset : piece.offset + piece.count].clone())
        for piece in held.pieces
        for state, flat in held.flats[piece.flat].items()
    ]
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for some in workers.from_all(mine):
        for name, start, numbers in some:
            pieces.setdefault(name, {})[start] = numbers
    return {name: torch.cat([some[start] for start in sorted(some)]) for name, some in pieces.items()}


def hyperparameters(engine):
    keys = ("name", "lr", "weight_decay", "ema_decay")
    return [{key: group[key] for key in keys} for group in engine.optimizer.param_groups]


def steps_of(engine):
    """Adam's step in every flat tensor of every rank, and how many tensors they are."""
    held = holdings(engine)
    scalars = [float(flat["step"]) for flat in held.scalars if "step" in flat]
    distinct = len({flat["step"].data_ptr() for flat in held.scalars if "step" in flat})
    return {"values": sorted({value for some in workers.from_all(scalars) for value in some}),
            "own": distinct == len(scalars)}  # fmt: skip


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def report(worker, **values):
    if worker.leads:
        print(json.dumps(values), flush=True)


def save_all(worker, root, options):
    """For each stage: 4 steps, a checkpoint, 3 more steps; back to the checkpoint, a step that is poisoned, 3 more."""
    for stage in options["stages"]:
        engine, layout = make_engine(worker, stage, **options.get("engine", {}))
        losses = train(engine, layout, worker, 0, 4)
        saved = Checkpoints(LocalFolder(root / f"stage-{stage}"), CheckpointSettings(), worker)
        saved.save(engine, 4, {})
        state = whole_state(engine)
        saved.wait()
        losses += train(engine, layout, worker, 4, 7)
        after = whole_state(engine)
        if worker.leads:
            groups = hyperparameters(engine)
            torch.save({"state": state, "after": after, "losses": losses, "groups": groups}, root / f"stage-{stage}.pt")
        checkpoint = saved.newest()
        assert checkpoint is not None
        saved.load(engine, checkpoint)
        restored = same(whole_state(engine), state)
        train(engine, layout, worker, 4, 6, poison=4)
        flags = workers.from_all(float(nonfinite_flag(engine)))
        untouched = same(whole_state(engine), state)
        saved.load(engine, checkpoint)
        again = train(engine, layout, worker, 4, 7)
        swap_average(engine)
        averaged = whole_state(engine)
        outputs = [engine.module.eval()(torch.ones(1, 3, 8, 8, dtype=layout.dtype)).float().sum().item()]
        swap_average(engine)
        report(
            worker,
            saved=stage,
            losses=losses,
            restored=restored,
            flags=flags,
            untouched=untouched,
            again=again,
            same_after=same(whole_state(engine), after),
            swapped=all(torch.equal(averaged[f"{name} weight"], after[f"{name} ema"]) for name in names(after)),
            outputs=outputs,
        )
        saved.close()
        engine.destroy()


def names(state):
    return sorted({key.split(" ")[0] for key in state})


def load_all(worker, root, options):
    """Saved stages into other stages: what the state is then, and three steps on."""
    for saved_stage, stage in options["pairs"]:
        known = torch.load(root / f"stage-{saved_stage}.pt")
        engine, layout = make_engine(worker, stage, seed=1, **options.get("engine", {}))
        saved = Checkpoints(LocalFolder(root / f"stage-{saved_stage}"), CheckpointSettings(), worker)
        checkpoint = saved.newest()
        assert checkpoint is not None
        saved.load(engine, checkpoint)
        state = whole_state(engine)
        steps = steps_of(engine)
        losses = train(engine, layout, worker, 4, 7)
        report(
            worker,
            saved=saved_stage,
            stage=stage,
            same_state=same(state, known["state"]),
            steps=steps,
            groups=hyperparameters(engine),
            known_groups=known["groups"],
            losses=losses,
            straight=known["losses"][4:],
            same_after=same(whole_state(engine), known["after"]),
        )
        saved.close()
        engine.destroy()


def begin_all(worker, root, options):
    """For each stage: what training begins with, against the weights as they were drawn or loaded in fp32."""
    for stage in options["stages"]:
        torch.manual_seed(0)
        drawn = {name: parameter.detach().clone() for name, parameter in VisionTransformer(CONFIG).named_parameters()}
        engine, layout = make_engine(worker, stage, **options.get("engine", {}))
        rounded = whole_state(engine)
        begin_with(engine, drawn)
        state = whole_state(engine)
        expected = {
            f"{name} {kind}": numbers.flatten() for name, numbers in drawn.items() for kind in ("weight", "ema")
        }
        module = engine.module.eval()
        images = torch.ones(1, 3, 8, 8, dtype=layout.dtype)
        begun = module(images)
        train(engine, layout, worker, 0, 1)
        report(
            worker,
            stage=stage,
            exact=all(torch.equal(state[name], numbers) for name, numbers in expected.items()),
            exact_before=all(torch.equal(rounded[name], numbers) for name, numbers in expected.items()),
            moments=max(float(state[name].abs().max()) for name in state.keys() - expected.keys()),
            begun=begun.float().tolist(),
            steps=steps_of(engine),
        )
        engine.destroy()


def main():
    prepare_deepspeed()
    torch.use_deterministic_algorithms(True)
    worker = workers.join(60)
    scenario, root, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    {"save": save_all, "load": load_all, "begin": begin_all}[scenario](worker, root, options)
    dist.barrier()


if __name__ == "__main__":
    main()
