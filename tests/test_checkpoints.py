"""Checkpoints on disk: committed whole or not there, found when damaged, kept and removed by rule."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.folders import LocalFolder, folder_at
from cluster.settings import SettingsError
from cluster.storage import StorageError
from pipeline import checkpoints, elastic, saving
from pipeline.checkpoints import full_weights, newest
from pipeline.config import CheckpointSettings
from pipeline.optimizer import AdamW, Guard
from pipeline.saving import CheckpointError, Checkpoints
from pipeline.workers import Worker
from tests.running import REPOSITORY, environment


def make_engine(seed: int = 0, averages: bool = True, width: int = 50):
    """A model and its optimizer as at ZeRO stage 0, without DeepSpeed around them."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 3, bias=False))
    guard = Guard(torch.device("cpu"))
    optimizer = AdamW(
        [{"params": list(module.parameters())}], lr=0.1, fused=False, guard=guard, averages=averages, clip=0.0
    )
    for group in optimizer.param_groups:
        group["ema_decay"] = 0.5
    one = SimpleNamespace(gradient_accumulation_steps=lambda: 1, train_batch_size=lambda: 4)
    return SimpleNamespace(module=module, optimizer=optimizer, **vars(one))


def take_step(engine, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    engine.module(torch.randn(4, engine.module[0].in_features, generator=generator)).square().sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def state_of(engine) -> dict[str, torch.Tensor]:
    held = elastic.holdings(engine)
    return {f"{p.name} {key}": flat.clone() for p in held.pieces for key, flat in held.flats[p.flat].items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def folder(tmp_path):
    return LocalFolder(tmp_path / "run" / "checkpoints")


@pytest.fixture
def open_checkpoints(folder, tmp_path):
    """Makes the checkpoints of a run; what is not an argument is the default of the settings."""
    opened = []

    def make(keep_every=None, place=folder, **given):
        settings = CheckpointSettings(scratch=str(tmp_path / "scratch"), **given)
        opened.append(Checkpoints(place, settings, Worker(), keep_every))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
    assert list((tmp_path / "scratch").iterdir()) == []


def save_steps(saved, *steps, engine=None, **state):
    engine = engine or make_engine()
    for step in steps:
        take_step(engine, step)
        saved.save(engine, step, state)
    saved.wait()
    return engine


def whole(folder) -> checkpoints.Checkpoint:
    """The newest, with its content verified."""
    found = newest(folder, verify_from=0)
    assert found is not None
    return found


def steps_in(folder) -> list[int]:
    return [int(name.split("-")[1]) for name in folder.folders()]


def test_a_state_comes_back_bit_by_bit_and_goes_on_the_same(open_checkpoints):
    saved = open_checkpoints()
    engine = save_steps(saved, 1, 2, note="kept")
    before = state_of(engine)
    take_step(engine, 3)
    other = make_engine(seed=9)
    checkpoint = saved.newest()
    assert (checkpoint.step, checkpoint.state["note"]) == (2, "kept")
    assert saved.load(other, checkpoint) == checkpoint
    assert same(state_of(other), before)
    assert other.global_steps == 2
    take_step(other, 3)
    assert same(state_of(other), state_of(engine))
    average = {name: before[f"{name} ema"] for name, _ in engine.module.named_parameters()}
    weights = full_weights(checkpoint)
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name].flatten(), average[name]) for name in average)


def test_the_hand_over_without_an_average_is_the_weights(open_checkpoints):
    saved = open_checkpoints()
    engine = save_steps(saved, 1, engine=make_engine(averages=False))
    weights = full_weights(saved.newest())
    assert all(torch.equal(weights[name], value) for name, value in engine.module.state_dict().items())


def test_an_average_that_is_switched_on_begins_with_the_weights(open_checkpoints):
    saved = open_checkpoints()
    engine = save_steps(saved, 1, engine=make_engine(averages=False))
    other = make_engine(seed=9)
    saved.load(other, saved.newest())
    found = state_of(other)
    for name, value in engine.module.named_parameters():
        assert torch.equal(found[f"{name} weight"], found[f"{name} ema"])
        assert torch.equal(found[f"{name} weight"], value.detach().flatten())


@pytest.mark.parametrize("damage", ["flipped", "short", "list", "manifest", "missing"])
def test_a_damaged_checkpoint_is_passed_over_loudly(open_checkpoints, folder, damage, caplog, monkeypatch):
    monkeypatch.setattr(checkpoints.log, "propagate", True)
    saved = open_checkpoints()
    engine = save_steps(saved, 1)
    before = state_of(engine)
    save_steps(saved, 2, engine=engine)
    place = folder.child(folder.folders()[-1]).local
    name = {"list": "rank-00000.json", "manifest": "manifest.json"}.get(damage, "rank-00000.bin")
    content = bytearray((place / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "short":
        content = content[:-4]
    (place / name).unlink()
    if damage != "missing":
        (place / name).write_bytes(content)
    other = make_engine(seed=9)
    assert saved.load(other, saved.newest()).step == 1
    assert same(state_of(other), before)
    assert "falling back" in caplog.text
    assert name in caplog.text
    assert whole(folder).step == 1
    # The next one takes its place, and it does not count as one of those that stay.
    save_steps(saved, 2, engine=other)
    assert steps_in(folder) == [1, 2]
    assert whole(folder).step == 2


def test_where_all_are_damaged_nothing_is_begun_anew(open_checkpoints, folder):
    saved = open_checkpoints()
    save_steps(saved, 1, 2)
    for part in folder.local.glob("*/rank-00000.bin"):
        content = bytearray(part.read_bytes())
        content[0] ^= 1
        part.write_bytes(content)
    with pytest.raises(SettingsError, match="is whole"):
        saved.load(make_engine(), saved.newest())
    with pytest.raises(SettingsError, match="none of the 2 checkpoint"):
        newest(folder, verify_from=0)


def test_a_manifest_that_cannot_be_read_for_a_moment_is_not_damaged(open_checkpoints, folder, caplog, monkeypatch):
    monkeypatch.setattr(checkpoints.log, "propagate", True)
    saved = open_checkpoints()
    save_steps(saved, 1, 2)
    manifest = folder.child(folder.folders()[-1]).local / "manifest.json"
    aside = manifest.rename(manifest.with_name("aside"))
    manifest.symlink_to("/proc/self/mem")  # a file whose first byte gives an input/output error
    for look in (saved.newest, lambda: newest(folder, verify_from=0)):
        with pytest.raises(OSError, match=r"Input/output error.*the storage fails.*goes on from this checkpoint"):
            look()
    assert "falling back" not in caplog.text
    aside.replace(manifest)
    assert whole(folder).step == 2


def test_what_was_not_committed_counts_for_nothing_and_is_removed(open_checkpoints, folder):
    saved = open_checkpoints()
    save_steps(saved, 1, 2)
    last = folder.child(folder.folders()[-1])
    last.remove("manifest.json")
    assert whole(folder).step == 1
    assert open_checkpoints().newest().step == 1
    assert steps_in(folder) == [1]


def test_the_last_ones_every_so_many_and_the_best_stay(open_checkpoints, folder):
    saved = open_checkpoints(keep=2, keep_every=4, keep_best="heldout/loss")
    engine = make_engine()
    for step in range(1, 11):
        save_steps(saved, step, engine=engine, scores={"heldout/loss": abs(step - 3.0)} if step > 1 else {})
    assert steps_in(folder) == [3, 4, 8, 9, 10]


def test_the_best_is_found_and_a_damaged_one_passed_over_loudly(open_checkpoints, folder, caplog):
    saved = open_checkpoints(keep=9)
    engine, scores = make_engine(), {1: 0.2, 2: 0.9, 3: 0.9, 4: math.nan, 5: 0.5}
    for step, score in scores.items():
        save_steps(saved, step, engine=engine, scores={"heldout/top1": score, "heldout/loss": score})
    save_steps(saved, 6, engine=engine)
    found = [checkpoints.best(folder, score) for score in ("heldout/top1", "heldout/loss", "heldout/top5")]
    assert [one and one.step for one in found] == [3, 1, None]
    part = next(path for path in (folder.local / folder.folders()[2]).glob("*.bin"))
    part.write_bytes(bytes(part.stat().st_size))
    (folder.local / folder.folders()[4] / "rank-00000.bin").unlink()
    second = checkpoints.best(folder, "heldout/top1")
    assert second is not None
    assert second.step == 2
    assert "falling back to the next best" in caplog.text


class SlowFolder(LocalFolder):
    """Takes no file before it is allowed to."""

    def __init__(self, path: Path, allowed: threading.Event) -> None:
        super().__init__(path)
        self.allowed = allowed

    def child(self, name: str) -> "SlowFolder":
        return SlowFolder(self.local / name, self.allowed)

    def put(self, path: Path, name: str, *, move: bool = False) -> None:
        self.allowed.wait()
        super().put(path, name, move=move)


def test_training_goes_on_while_a_checkpoint_is_brought_to_its_place(open_checkpoints, folder):
    allowed = threading.Event()
    saved = open_checkpoints(place=SlowFolder(folder.local, allowed))
    engine = make_engine()
    take_step(engine, 1)
    before = state_of(engine)
    saved.save(engine, 1, {})
    take_step(engine, 2)  # changes what is in memory, not what is on its way
    assert newest(folder) is None
    timer = threading.Timer(0.3, allowed.set)
    timer.start()
    began = time.perf_counter()
    saved.save(engine, 2, {})  # waits for the one before
    assert whole(folder).step == 1
    assert time.perf_counter() - began >= 0.3
    saved.wait()
    other = make_engine(seed=9)
    first = next(name for name in folder.folders() if name.startswith("step-00000001"))
    saved.load(other, checkpoints.Checkpoint(folder.child(first), folder.child(first).read_json("manifest.json")))
    assert same(state_of(other), before)


KILLED = """
    import sys, threading
    from cluster.folders import LocalFolder
    from pipeline import saving
    from pipeline.workers import Worker
    from pipeline.config import CheckpointSettings
    from tests.test_checkpoints import make_engine, save_steps, take_step

    root, moment = sys.argv[1:]
    reached, forever = print, threading.Event().wait
    saved = saving.Checkpoints(LocalFolder(__import__("pathlib").Path(root, "run/checkpoints")),
                                    CheckpointSettings(scratch=root + "/scratch"), Worker())
    engine = save_steps(saved, 1)
    take_step(engine, 2)
    real_put, real_json, real_part = LocalFolder.put, LocalFolder.write_json, saving.write_part
    def put(self, path, name, **options):
        if moment == "before " + name:
            print("now", flush=True); forever()
        real_put(self, path, name, **options)
    def write_json(self, name, value):
        if moment == "before " + name:
            print("now", flush=True); forever()
        real_json(self, name, value)
    def write_part(*arguments):
        real_part(*arguments)
        print("now", flush=True); forever()
    LocalFolder.put, LocalFolder.write_json = put, write_json
    if moment == "on scratch":
        saving.write_part = write_part
    saved.save(engine, 2, {})
    saved.wait()
"""


@pytest.mark.parametrize(
    "moment",
    [
        "on scratch",
        pytest.param("before rank-00000.bin", marks=pytest.mark.slow),
        pytest.param("before rank-00000.json", marks=pytest.mark.slow),
        "before manifest.json",
    ],
)
def test_killed_at_any_moment_of_a_save_the_one_before_is_whole(open_checkpoints, folder, tmp_path, moment):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), moment],
        cwd=REPOSITORY, env=environment(tmp_path), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert whole(folder).step == 1
    assert list((tmp_path / "scratch").iterdir()) != []
    saved = open_checkpoints()  # the fixture sees that the dead process's scratch is gone
    save_steps(saved, 2)
    assert steps_in(folder) == [1, 2]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_clear_error_and_the_one_before_stays(open_checkpoints, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoints.log, "propagate", True)
    monkeypatch.setattr(saving, "_RETRY_WAITS", (0.01, 0.01))
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        place = LocalFolder(small / "checkpoints")
        saved = open_checkpoints(place=place)
        engine = save_steps(saved, 1)  # 43 kB
        take_step(engine, 2)
        saved.save(engine, 2, {})
        saved.save(engine, 3, {})  # what kept the one before from its place may have passed
        assert re.search("step 2 could not be written.*Trying that of step 3", caplog.text)
        with pytest.raises(CheckpointError, match=r"step 3 .*No space left on device.*before it are as they were"):
            saved.save(engine, 4, {})
        assert whole(place).step == 1
        assert len(place.folders()) == 1
        (small / "room").mkdir()
        subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
        save_steps(open_checkpoints(place=place), 3, engine=engine)
        assert whole(place).step == 3
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_on_s3_faults_that_pass_change_nothing_and_those_that_stay_are_one_error(
    s3, open_checkpoints, monkeypatch, caplog
):
    monkeypatch.setattr(checkpoints.log, "propagate", True)
    monkeypatch.setattr(saving, "_RETRY_WAITS", (0.01,))
    place = folder_at(s3.bucket() + "/run/checkpoints", "run.home")
    saved = open_checkpoints(place=place)
    s3.faults.rates = {"slow_down": 0.1, "reset": 0.1, "lost_answer": 0.1, "short": 0.1}
    engine = save_steps(saved, 1, 2)
    before = state_of(engine)
    other = make_engine(seed=9)
    checkpoint = saved.newest()
    assert checkpoint.step == 2
    assert saved.load(other, checkpoint) == checkpoint
    assert same(state_of(other), before)
    assert s3.faults.injected.total() > 3
    s3.faults.clear()
    s3.faults.rates, s3.faults.only = {"denied": 1.0}, "PUT .*manifest"
    with pytest.raises(CheckpointError, match="step 3 could not be written"):
        save_steps(saved, 3, engine=engine)
    s3.faults.clear()
    assert steps_in(place) == [1, 2]
    # A store that fails says nothing of what lies there.
    s3.faults.rates, s3.faults.only = {"denied": 1.0}, r"GET .*rank-00000\.bin"
    with pytest.raises(StorageError, match="access denied"):
        saved.load(other, checkpoint)
    s3.faults.only = "GET .*manifest"
    with pytest.raises(StorageError, match=r"access denied.*the storage fails"):
        saved.newest()
    assert "falling back" not in caplog.text
    s3.faults.clear()
    content = bytearray(checkpoint.folder.read_bytes("rank-00000.bin"))
    content[100] ^= 1
    checkpoint.folder.write_bytes("rank-00000.bin", content)
    assert saved.load(other, checkpoint).step == 1
    assert "falling back" in caplog.text


def test_a_part_that_fails_to_arrive_at_first_is_tried_again(open_checkpoints, folder, monkeypatch):
    monkeypatch.setattr(saving, "_RETRY_WAITS", (0.01, 0.5))
    blocked = folder.local
    blocked.parent.mkdir(parents=True)
    saved = open_checkpoints()
    blocked.write_text("in the way")
    threading.Timer(0.2, blocked.unlink).start()
    save_steps(saved, 1)
    assert whole(folder).step == 1


def test_a_scratch_folder_that_cannot_be_used_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"checkpoint\.scratch"):
        Checkpoints(folder, CheckpointSettings(scratch=str(tmp_path / "file" / "x")), Worker())


def test_the_scratch_of_a_living_process_is_left_alone(open_checkpoints, tmp_path):
    first = open_checkpoints()
    engine = make_engine()
    second = open_checkpoints()
    assert len(list((tmp_path / "scratch").iterdir())) == 2
    save_steps(first, 1, engine=engine)
    second.close()
    assert list((tmp_path / "scratch").iterdir()) == [first.scratch]


def test_what_a_user_keeps_in_the_scratch_folder_is_left_alone(open_checkpoints, tmp_path):
    scratch = tmp_path / "scratch"
    theirs = ["dataset/image.jpg", "dataset.lock", "checkpoints-0-0123456789ab/rank-00000.bin"]
    theirs += ["checkpoints-0-0123456789ab.lock", "vitforge-checkpoints-0-0123456789abcdef/rank-00000.bin"]
    for name in theirs:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text("theirs")
    save_steps(open_checkpoints(), 1)
    open_checkpoints().close()
    assert [(scratch / name).read_text() for name in theirs] == ["theirs"] * 5
    shutil.rmtree(scratch / "dataset")
    for path in sorted(scratch.rglob("*"), reverse=True):  # for the fixture
        if path.relative_to(scratch).parts[0] in {Path(name).parts[0] for name in theirs}:
            path.rmdir() if path.is_dir() else path.unlink()


def test_what_a_user_adds_to_a_checkpoint_stays_and_so_does_one_behind_a_link(open_checkpoints, folder, tmp_path):
    save_steps(open_checkpoints(), 1)
    first = folder.local / folder.folders()[0]
    other = tmp_path / "other" / first.name.replace("00000001", "00000002")
    shutil.copytree(first, other)
    (first / "notes.txt").write_text("mine")
    (folder.local / other.name).symlink_to(other)
    before = sorted(path.name for path in other.iterdir())
    save_steps(open_checkpoints(keep=1), 3, 4)
    assert [path.name for path in first.iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in other.iterdir()) == before
    open_checkpoints()
    assert (first / "notes.txt").read_text() == "mine"


def test_a_temporary_folder_that_may_be_another_s_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = tmp_path / f"vitforge-{os.geteuid()}"
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match=r"is a symbolic link, .* or checkpoint\.scratch"):
        Checkpoints(folder, CheckpointSettings(), Worker())
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_update_that_is_not_finite_is_never_applied_and_never_saved(open_checkpoints):
    engine = make_engine()
    saved = open_checkpoints()
    save_steps(saved, 1, engine=engine)
    before = state_of(engine)
    engine.module[0].weight.grad = torch.full_like(engine.module[0].weight, float("inf"))
    engine.module[1].weight.grad = torch.ones_like(engine.module[1].weight)
    engine.optimizer.step()
    take_step(engine, 2)  # nor any after it
    assert same(state_of(engine), before)
    assert engine.optimizer.guard.flag == 1
    with pytest.raises(AssertionError, match="not finite"):
        saved.save(engine, 2, {})
    saved.load(engine, saved.newest())
    assert engine.optimizer.guard.flag == 0
    take_step(engine, 2)
    assert not same(state_of(engine), before)
