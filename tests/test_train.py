"""The training command: determinism, resume, several processes, files and errors (train.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from model import LVMAE, LVMAEConfig, load_checkpoint, load_data

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--depth 1 --heads 2 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --device cpu"
SMALL += " --base-lr 0.2"


def write_npz(path, videos=40, D=16, seed=0):
    """Random walks: neighbouring segments are alike, so that there is something to learn."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 12, videos)
    rows = np.concatenate([random.normal(size=(n, D)).cumsum(0) + 3 for n in lengths])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = np.array([f"{path.stem}/{i}.mp4" for i in range(videos)])
    np.savez(path, embeddings=rows.astype(np.float16), lengths=lengths, videos=names)
    return str(path)


def run(folder, *flags, processes=1, check=True):
    """Run the real command in `folder` -> CompletedProcess."""
    launch = [sys.executable]
    if processes > 1:
        launch += f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [*launch, str(ROOT / "train.py"), *SMALL.split(), *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def losses(folder, name="lvmae"):
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [(r["loss"], r["val_loss"], r["cosine"]) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 6 epochs that was never stopped: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_npz(folder / "out.npz", videos=200)  # 20 to validate on: more than one batch
    return folder, run(folder, "--epochs", 6, "--warmup-epochs", 2).stdout


def test_training_learns_and_says_so(uninterrupted):
    """Catches a run that prints no bar to pass, learns nothing, or writes a checkpoint in vain."""
    folder, printed = uninterrupted
    for name in ("visible mean", "interpolation", "average of both"):
        assert f"trivial predictor: {name}" in printed
    assert losses(folder)[-1][1] < 0.7 * losses(folder)[0][1]
    assert printed.splitlines()[-1].startswith("lvmae.pt: 6 epochs, validation cosine")
    checkpoint = torch.load(folder / "lvmae.pt", weights_only=True)
    keys = {"model", "config", "optimizer", "epoch", "args", "data", "encoder", "log"}
    assert checkpoint.keys() == keys and checkpoint["epoch"] == 6
    data = load_data(str(folder / "out.npz"))
    model = load_checkpoint(str(folder / "lvmae.pt"), data, torch.device("cpu"))
    assert torch.equal(
        model.decoder_pred.weight, checkpoint["model"]["decoder_pred.weight"]
    )
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("epochs_before_kill", [0, 3])
def test_resume_after_sigkill_is_exact(uninterrupted, tmp_path, epochs_before_kill):
    """Catches anything that a kill loses: weights, moments, schedule, the state of randomness."""
    folder, _ = uninterrupted
    (tmp_path / "out.npz").write_bytes((folder / "out.npz").read_bytes())
    flags = [
        str(ROOT / "train.py"),
        *SMALL.split(),
        "--epochs",
        "6",
        "--warmup-epochs",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, *flags], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    log = tmp_path / "lvmae.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < epochs_before_kill:
        time.sleep(0.005)
        assert process.poll() in (None, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(tmp_path, "--epochs", 6, "--warmup-epochs", 2, "--resume")
    assert losses(tmp_path) == losses(folder)


def test_two_processes_equal_one(uninterrupted, tmp_path):
    """Catches gradients averaged with the wrong weights, and batches drawn per process."""
    folder, _ = uninterrupted
    (tmp_path / "out.npz").write_bytes((folder / "out.npz").read_bytes())
    flags = ("--epochs", 6, "--warmup-epochs", 2, "--batch-size", 8)
    run(tmp_path, *flags, processes=2)
    np.testing.assert_allclose(losses(tmp_path), losses(folder), atol=1e-5)
    # and another number of processes may go on where these stopped
    checkpoint = torch.load(tmp_path / "lvmae.pt", weights_only=True)
    torch.save(checkpoint | {"log": checkpoint["log"][:5]}, tmp_path / "lvmae.pt")
    run(tmp_path, "--epochs", 6, "--warmup-epochs", 2, "--resume")
    assert len(losses(tmp_path)) == 6


def test_each_process_reads_its_share_of_the_files(tmp_path):
    """Catches a process that reads all files, and checkpoints that lose some of their names."""
    files = [write_npz(tmp_path / f"part{i}.npz", videos=20, seed=i) for i in range(3)]
    done = run(
        tmp_path, "--data", *files, "--epochs", 1, "--batch-size", 8, processes=2
    )
    assert "54 videos to train on, 6 to validate on" in done.stdout
    checkpoint = torch.load(tmp_path / "lvmae.pt", weights_only=True)
    names = [name.split()[0] for name in checkpoint["data"]]
    assert names == ["part0.npz", "part1.npz", "part2.npz"]


def test_several_files_are_one_data_set(tmp_path):
    """Catches rows of a second file that are looked up in the first."""
    files = [write_npz(tmp_path / f"part{i}.npz", videos=10, seed=i) for i in range(2)]
    data, learned, held_out = train.read_videos(files, 0.1, seed=0)
    parts = [load_data(path) for path in files]
    second = data.embeddings[data.first[10] : data.first[10] + data.lengths[10]]
    assert torch.equal(second, parts[1].embeddings[: parts[1].lengths[0]])
    assert sorted([*learned.tolist(), *held_out.tolist()]) == list(range(20))
    assert len(held_out) == 2 and held_out.min() < 10 <= held_out.max()


def test_crops():
    """Catches crops that leave their video, have one segment, or are never the whole video."""
    lengths = torch.arange(2, 40).repeat_interleave(200)
    first = lengths.cumsum(0) - lengths
    size, begin = train.crop(lengths, first, 20, train.seeded(0))
    assert (size >= 2).all() and (size <= lengths.clamp(max=20)).all()
    assert (begin >= first).all() and (begin + size <= first + lengths).all()
    assert (size[-200:] == 20).any() and (size[-200:] == 2).any()
    assert (begin + size == first + lengths)[-200:].any() and (begin == first)[
        -200:
    ].any()


def test_learning_rate_by_hand():
    """Catches a schedule without MAE's rule, its warm-up, or its decay to zero."""
    args = train.get_args(["--preset", "paper"])
    peak = 1.5e-4 * 16 * 8 / 256
    expected = {0: 0, 20: peak / 2, 40: peak, 95: peak / 2, 150: 0}
    for epoch, lr in expected.items():
        assert train.learning_rate(epoch, args, world=8) == pytest.approx(lr, abs=1e-12)


def test_presets_and_flags(capsys):
    """Catches a preset that overrides a flag, is not Table 5, or does not show in --help."""
    args = train.get_args("--preset paper --depth 3 --mask semantic".split())
    assert (args.depth, args.heads, args.mask_ratio, args.epochs) == (3, 16, 0.5, 150)
    assert (args.weight_decay, args.beta1, args.beta2, args.batch_size) == (
        0.05,
        0.9,
        0.95,
        16,
    )
    assert train.get_args([]).mask_ratio == 0.4
    with pytest.raises(SystemExit):
        train.get_args("--preset paper --help".split())
    assert "layers of the encoder (default: 32)" in " ".join(
        capsys.readouterr().out.split()
    )
    for flags in (
        ["--mask-ratio", "1.5"],
        ["--batch-size", "0"],
        ["--max-segments", "1"],
    ):
        with pytest.raises(SystemExit):
            train.get_args(flags)


def test_biases_and_norms_do_not_decay():
    """Catches weight decay on parameters that must not shrink."""
    model = LVMAE(LVMAEConfig(8, 1, 2, 8, 1, 2))
    decay, free = train.make_optimizer(model, train.get_args([])).param_groups
    assert {p.ndim for p in free["params"]} == {1} and free["weight_decay"] == 0
    assert {p.ndim for p in decay["params"]} == {2, 3} and decay["weight_decay"] == 0.05


def test_long_crops(tmp_path, monkeypatch):
    """Catches sizes that stop at 256 segments."""
    monkeypatch.chdir(tmp_path)
    D, n = 16, 1080
    rows = np.eye(D)[np.arange(3 * n) % D].astype(np.float16)
    np.savez("out.npz", embeddings=rows, lengths=[n] * 3, videos=["a", "b", "c"])
    train.main(train.get_args(f"{SMALL} --max-segments {n} --epochs 1".split()))
    config = torch.load("lvmae.pt", weights_only=True)["config"]
    assert config["max_segments"] == n


def test_not_a_number_stops_and_keeps_the_checkpoint(
    uninterrupted, tmp_path, monkeypatch
):
    """Catches a broken run that overwrites the last good checkpoint, or its log."""
    folder, _ = uninterrupted
    for name in ("out.npz", "lvmae.pt", "lvmae.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    before, log = (
        (tmp_path / "lvmae.pt").read_bytes(),
        (tmp_path / "lvmae.jsonl").read_text(),
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="the loss is"):
        flags = f"{SMALL} --epochs 2 --base-lr 1e30 --warmup-epochs 0"
        train.main(train.get_args(flags.split()))
    assert (tmp_path / "lvmae.pt").read_bytes() == before
    assert (tmp_path / "lvmae.jsonl").read_text() == log


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "missing.npz"], "missing.npz: found FileNotFound"),
        (["--heads", "3"], "--heads 3: must divide 16"),
        (["--resume", "--depth", "2"], "lvmae.pt: made with --depth 1, found 2"),
        (
            ["--resume", "--data", "other.npz"],
            "made with --data .*out.npz.*found .*other.npz",
        ),
        (
            ["--resume", "--batch-size", "8"],
            "made with --batch-size x processes 16, found 8",
        ),
        (["--resume", "--out", "out.npz"], "out.npz: found .*expected a checkpoint"),
        (["--data", "tiny.npz"], "tiny.npz: 1 videos of 2 or more segments: too few"),
        (
            ["--data", "out.npz", "wide.npz"],
            "wide.npz: embeddings of size 32, but out.npz has 16",
        ),
    ],
)
def test_errors_are_one_line(uninterrupted, monkeypatch, flags, message):
    """Catches a traceback where a line that names the fault would do."""
    folder, _ = uninterrupted
    write_npz(folder / "other.npz", seed=1)
    write_npz(folder / "tiny.npz", videos=1)
    write_npz(folder / "wide.npz", D=32)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=message) as error:
        train.main(
            train.get_args(f"{SMALL} --epochs 6 --warmup-epochs 2".split() + flags)
        )
    assert "\n" not in str(error.value)
