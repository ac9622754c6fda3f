# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Runs that are stopped at any moment, files that are damaged, and a loss that is no number."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from bundle.data.fingerprint import describe
from bundle.data.stream import ScanStream
from bundle.errors import InputError
from bundle.files import DamagedFile, file_sha256, load_checked, remove_leftovers, save_checked, write_atomically
from bundle.handlers import GradientClip
from bundle.run import PredictionWriter, RunCheckpoint
from bundle.run.checkpoint import folder_lock, lock
from bundle.survival import SurvivalMapLoss

from .commands import run, train


@pytest.fixture(autouse=True)
def _sigterm():
    """Every run sets a handler; the tests' own process keeps its one."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def stop_after(epoch, monkeypatch):
    """Let trainings stop as soon as this epoch is saved."""
    save = RunCheckpoint.save

    def save_then_stop(self, engine):
        save(self, engine)
        if engine.state.epoch == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunCheckpoint, "save", save_then_stop)


@pytest.fixture(scope="module")
def stopped(tiny_cohort, tmp_path_factory, root):
    """Folder of a training of 4 epochs that was stopped after the third."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_cohort, folder)
    return folder


def test_any_cut_and_any_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    content = {"weights": torch.arange(5.0), "epoch": 3, "list": [1, 2]}
    save_checked(content, path)
    assert torch.equal(load_checked(path)["weights"], content["weights"])
    assert torch.load(path, weights_only=True)["epoch"] == 3  # as any other checkpoint
    whole = path.read_bytes()
    for length in (0, 1, 70, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            load_checked(path)
    for byte in range(0, len(whole), 13):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :])
        with pytest.raises(DamagedFile):
            load_checked(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def torn(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="x.txt can't be written: No space left on device"):
        write_atomically(path, torn)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]

    def killed(temporary):
        temporary.write_text("ne")
        temporary.rename(temporary.with_name(temporary.name.replace(f"-{os.getpid()}-", f"-{dead}-")))
        raise KeyboardInterrupt

    gone, zombie = subprocess.Popen(["true"]), subprocess.Popen(["true"])
    gone.wait()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has asked how, as in some containers
    for dead in (gone.pid, zombie.pid):  # noqa: B007  `killed` reads it
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, killed)
    write_atomically(tmp_path / "other.txt", lambda p: (p.write_text("alive"), remove_leftovers(tmp_path)))
    zombie.wait()
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.txt", "x.txt"]


def test_threads_may_write_the_same_file(tmp_path):
    def write(value: int) -> None:
        for _ in range(20):
            write_atomically(tmp_path / "same.txt", lambda p: p.write_text(f"{value}\n" * 1000))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(set((tmp_path / "same.txt").read_text().split())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["same.txt"]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    path = tmp_path / f"{'a' * 248}.nii.gz"
    write_atomically(path, lambda p: p.write_text(p.name))
    assert path.read_text().endswith(".nii.gz")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    damage,
    tiny_cohort,
    tmp_path,
    trained,
    stopped,
    capsys,  # noqa: F811
):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    last = folder / "last.pt"
    assert load_checked(last)["epoch"] == 3 and load_checked(folder / "previous.pt")["epoch"] == 2
    content = bytearray(last.read_bytes())
    content[len(content) // 3] ^= 32
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    train(tiny_cohort, folder)
    said = capsys.readouterr().out
    assert ("last.pt is damaged" in said) == (damage != "gone") and "going on after epoch 2 of 4" in said
    assert (folder / "model.pt").read_bytes() == trained.read_bytes()
    assert describe(load_checked(folder / "last.pt")) == describe(load_checked(trained.parent / "last.pt"))
    assert (folder / "history.csv").read_bytes() == (trained.parent / "history.csv").read_bytes()


def test_if_both_checkpoints_are_damaged_only_the_user_may_start_again(tiny_cohort, tmp_path, stopped):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"last.pt and .*previous.pt: damaged.*--resume false starts from the beginning"):
        train(tiny_cohort, folder)


def test_a_finished_run_mends_its_weights(tiny_cohort, tmp_path, trained, capsys):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(trained.parent, folder)
    content = bytearray(trained.read_bytes())
    content[-300] ^= 1
    (folder / "model.pt").write_bytes(content)
    train(tiny_cohort, folder)
    assert "SHA-256 differ. They are written again" in capsys.readouterr().out
    for name in ("model.pt", "settings.json"):
        assert (folder / name).read_bytes() == (trained.parent / name).read_bytes()
    assert describe(load_checked(folder / "last.pt")) == describe(load_checked(trained.parent / "last.pt"))


def test_sigterm_ends_a_training_which_goes_on_to_the_very_same_weights(tiny_cohort, tmp_path, trained, monkeypatch):  # noqa: F811
    clip = GradientClip.__call__

    def terminate(self, engine):
        clip(self, engine)
        if engine.state.iteration == 8:  # within the third epoch of three steps
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(GradientClip, "__call__", terminate)
        with pytest.raises(SystemExit) as stop:
            train(tiny_cohort, tmp_path)
    assert stop.value.code == 143
    assert load_checked(tmp_path / "last.pt")["epoch"] == 2
    assert train(tiny_cohort, tmp_path).read_bytes() == trained.read_bytes()


def test_a_loss_that_is_no_number_stops_training_with_the_patients_and_the_last_good_weights(
    tiny_cohort, tmp_path, stopped, monkeypatch
):
    folder, forward = tmp_path / "run", SurvivalMapLoss.forward
    shutil.copytree(stopped, folder)
    before = (folder / "last.pt").read_bytes()
    monkeypatch.setattr(SurvivalMapLoss, "forward", lambda self, *args: forward(self, *args) * torch.nan)
    with pytest.raises(InputError, match=r"the loss is nan in epoch 4 for the patients p\d+, p\d+, p\d+, p\d+; .* last.pt"):
        train(tiny_cohort, folder)
    assert (folder / "last.pt").read_bytes() == before
    assert all(v.isfinite().all() for v in torch.load(folder / "model.pt", weights_only=True).values())


@pytest.mark.parametrize(
    "loss, network_grad, objective_grad, message",
    [
        (1.0, 1.0, 1.0, None),
        (1.0, 5e8, 1.0, None),
        (float("inf"), 1.0, 1.0, "the loss is inf"),
        (1.0, 1e10, 1.0, "the gradient's norm is 1e+10"),
        (1.0, float("nan"), 1.0, "the gradient's norm is nan"),
        (1.0, 1.0, float("nan"), "the gradient's norm is nan"),
        (1.0, 1.0, 1e11, "the gradient's norm is 1e+11"),
    ],
)
def test_exploding_gradients_stop_training(loss, network_grad, objective_grad, message):
    network, objective = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    network.weight.grad, objective.weight.grad = torch.full((1, 1), network_grad), torch.full((1, 1), objective_grad)
    state = SimpleNamespace(output={"loss": torch.tensor(loss)}, batch={"patient_id": ["a", "b"]}, epoch=7)
    clip = GradientClip(network, 1.0, objective)
    if message is None:
        clip(SimpleNamespace(state=state))
        assert network.weight.grad.item() == pytest.approx(1.0, rel=1e-4) and objective.weight.grad.item() == 1.0
    else:
        with pytest.raises(InputError, match=re.escape(message) + " in epoch 7 for the patients a, b"):
            clip(SimpleNamespace(state=state))


def test_a_gradient_counts_no_more_than_is_usual():
    network = torch.nn.Linear(1, 1, bias=False)
    state = SimpleNamespace(output={"loss": torch.tensor(1.0)}, batch={"patient_id": ["a"]}, epoch=1)
    clip = GradientClip(network, 1.0)

    def clipped(grad: float) -> float:
        network.weight.grad = torch.full((1, 1), grad)
        clip(SimpleNamespace(state=state))
        return network.weight.grad.item()

    assert clipped(20.0) == pytest.approx(1.0, rel=1e-4)  # the first step knows of none before
    assert [clipped(0.002) for _ in range(3)] == pytest.approx([0.002] * 3, rel=1e-2)
    assert clipped(400.0) == pytest.approx(0.002, rel=1e-2)
    going_on = GradientClip(network, 1.0)
    going_on.load_state_dict(clip.state_dict())
    clip = going_on
    assert clipped(-400.0) == pytest.approx(-0.002, rel=1e-2)
    assert [clipped(0.5) for _ in range(60)][-1] == pytest.approx(0.5, rel=1e-4)  # the usual follows
    assert [clipped(0.0) for _ in range(60)][-1] == 0.0  # batches that teach nothing
    assert clipped(0.3) == pytest.approx(0.3, rel=1e-4)


def test_a_second_training_in_a_folder_waits_for_the_first(tmp_path, caplog):
    code = "import sys, filelock as f; x = f.FileLock(sys.argv[1]); x.acquire(); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        waiting = threading.Thread(target=lock, args=(tmp_path,))
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive() and "another process is training" in caplog.text
        other.kill()
    waiting.join(30)
    assert not waiting.is_alive() and folder_lock(tmp_path.resolve()).is_locked
    lock(tmp_path)  # the same process doesn't wait for itself


@pytest.mark.slow
def test_stopped_inference_goes_on_and_does_again_only_what_has_changed(tiny_cohort, tmp_path, trained, monkeypatch):  # noqa: F811
    table = pd.read_csv(tiny_cohort)[:4][["patient_id", "image"]]
    for name in table.image:
        shutil.copy(tiny_cohort.parent / name, tmp_path)
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    table.loc[4] = ["bad", "bad.nii.gz"]
    cohort = tmp_path / "c.csv"
    table.to_csv(cohort, index=False)
    read: list[str] = []
    scans, add = ScanStream.__iter__, PredictionWriter.add

    def counted(self):
        for item in scans(self):
            read.append(item["patient_id"])
            yield item

    def stop_at_second(self, engine):
        if engine.state.iteration == 2:
            raise KeyboardInterrupt
        add(self, engine)

    monkeypatch.setattr(ScanStream, "__iter__", counted)

    def infer(folder="out", **override):
        read.clear()
        args = {"cohort": str(cohort), "ckpt": str(trained), "output_dir": str(tmp_path / folder), "shifts": 1}
        with pytest.raises(InputError, match="1 of 5 scans failed"):
            run("configs/inference.json", **args | override)
        return list(read)

    def left(folder):
        files = sorted(p for p in (tmp_path / folder).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / folder)): p.read_bytes() for p in files}

    assert infer("once") == ["p0", "p1", "p2", "p3"]
    with monkeypatch.context() as patch:
        patch.setattr(PredictionWriter, "add", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            run("configs/inference.json", cohort=str(cohort), ckpt=str(trained), output_dir=str(tmp_path / "out"), shifts=1)
    assert not (tmp_path / "out" / "predictions.csv").exists()
    assert infer() == ["p1", "p2", "p3"]  # the bad one is tried again each time, and never read
    assert left("out") == left("once") and "maps/p3_heat.nii.gz" in left("out")
    assert infer() == [] and left("out") == left("once")
    # A torn map, a lost picture, a torn record: that scan alone.
    (tmp_path / "out" / "maps" / "p0_heat.nii.gz").write_bytes(b"torn")
    (tmp_path / "out" / "maps" / "p1_heat.png").unlink()
    (tmp_path / "out" / "done" / "p3.json").write_text('{"key": ')
    assert infer() == ["p0", "p1", "p3"] and left("out") == left("once")
    # Another scan under the same name: that one. Other options or weights: all.
    shutil.copy(tiny_cohort.parent / "p5.nii.gz", tmp_path / "p2.nii.gz")
    assert infer() == ["p2"]
    assert infer(sigma=0.0) == ["p0", "p1", "p2", "p3"]
    other = tmp_path / "weights"
    other.mkdir()
    weights = torch.load(trained, weights_only=True)
    next(iter(weights.values())).add_(0.1)
    torch.save(weights, other / "model.pt")
    settings = json.loads((trained.parent / "settings.json").read_text())
    settings["weights_sha256"] = file_sha256(other / "model.pt")
    (other / "settings.json").write_text(json.dumps(settings))
    assert infer(sigma=0.0, ckpt=str(other / "model.pt")) == ["p0", "p1", "p2", "p3"]


@pytest.mark.kill
def test_killed_runs_end_as_if_they_had_been_left_alone(root):
    command = [sys.executable, "-m", "scripts.research.kill_test", "--kills", "2", "--sweep_kills", "1", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0 and done.stdout.endswith("\n11 of 11\n"), done.stdout + done.stderr[-3000:]
