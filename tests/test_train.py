"""The training command: determinism, resume, several processes, files and errors."""

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
from model import LVMAE, MASKS, LVMAEConfig, load_checkpoint, load_data

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--depth 1 --heads 2 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 "
    "--device cpu --base-lr 0.2 --warmup-epochs 2"
)


def write_npz(path, videos=40, D=16, seed=0, **arrays):
    """Random walks: neighbouring segments are alike, so there is something to learn."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 12, videos)
    rows = np.concatenate([random.normal(size=(n, D)).cumsum(0) + 3 for n in lengths])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = np.array([f"{path.stem}/{i}.mp4" for i in range(videos)])
    rows = rows.astype(np.float16)
    np.savez(path, embeddings=rows, lengths=lengths, videos=names, **arrays)
    return str(path)


def command(*flags, processes=1):
    """The real command, as a list for subprocess."""
    launch = [sys.executable]
    if processes > 1:
        launch += "-m torch.distributed.run --standalone".split()
        launch += ["--nproc-per-node", str(processes)]
    return [*launch, str(ROOT / "train.py"), *SMALL.split(), *map(str, flags)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(folder, *flags, processes=1):
    """Run the real command in `folder` -> what it printed."""
    done = subprocess.run(
        command(*flags, processes=processes),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(*flags):
    """Run train.py in this process and in the current folder."""
    train.main(train.get_args([*SMALL.split(), *map(str, flags)]))


def read_log(folder, name="lvmae"):
    """Lines of the log, without those of the trivial predictors."""
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return [line for line in lines if "predictor" not in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 6 epochs that was never stopped: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_npz(folder / "out.npz", videos=200)  # 20 to validate on: more than one batch
    return folder, run(folder, "--epochs", 6)


@pytest.fixture
def copy(uninterrupted, tmp_path, monkeypatch):
    """A copy of that run, as the current folder."""
    folder, _ = uninterrupted
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- What a run leaves ----------------------------------------------------------------


def test_training_learns_and_says_so(uninterrupted):
    """Catches a run that learns nothing, or writes a checkpoint that nobody can use."""
    folder, printed = uninterrupted
    for name in train.TRIVIAL:
        assert f"predictor {name}" in printed
    log = read_log(folder)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["val_loss"] < 0.7 * log[0]["val_loss"]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    last = printed.splitlines()[-1]
    assert last.startswith("lvmae.pt: 6 epochs, validation cosine")
    assert not list(folder.glob("*.tmp"))


def test_checkpoint_tells_what_it_was_trained_on(uninterrupted):
    """Catches a checkpoint without the names trained on, or with validation videos."""
    folder, _ = uninterrupted
    checkpoint = torch.load(folder / "lvmae.pt", weights_only=True)
    keys = "model config optimizer epoch args log encoder videos"
    assert checkpoint.keys() == set(keys.split()) and checkpoint["epoch"] == 6
    data = load_data(str(folder / "out.npz"))
    assert len(set(checkpoint["videos"])) == 180
    assert set(checkpoint["videos"]) < set(data.videos)
    assert checkpoint["args"]["mask"] == "random"
    model, _ = load_checkpoint(str(folder / "lvmae.pt"), data, torch.device("cpu"))
    weight = checkpoint["model"]["decoder_pred.weight"]
    assert torch.equal(model.decoder_pred.weight, weight)


def test_long_crops(tmp_path, monkeypatch):
    """Catches sizes that stop at 256 segments."""
    monkeypatch.chdir(tmp_path)
    rows = np.eye(16)[np.arange(3 * 1080) % 16].astype(np.float16)
    np.savez("out.npz", embeddings=rows, lengths=[1080] * 3, videos=["a", "b", "c"])
    run_here("--max-segments", 1080, "--epochs", 1)
    config = torch.load("lvmae.pt", weights_only=True)["config"]
    assert config["max_segments"] == 1080


def test_no_validation(copy):
    """Catches a share of 0 that still keeps videos back, or a log of NaN."""
    os.remove("lvmae.pt")
    os.remove("lvmae.jsonl")
    run_here("--epochs", 1, "--val-share", 0)
    assert len(torch.load("lvmae.pt", weights_only=True)["videos"]) == 200
    assert read_log(copy)[0].keys() == {"epoch", "loss", "lr"}


def test_excluded_videos_are_not_trained_on(copy, capsys):
    """Catches test videos in the pre-training: neither trained on nor validated on."""
    Path("names.txt").write_text("out/0.mp4\n1\nout/2\n3.mp4\n\nnowhere\n")
    run_here("--epochs", 1, "--val-share", 0, "--exclude", "names.txt", "--out", "x.pt")
    videos = torch.load("x.pt", weights_only=True)["videos"]
    assert set(videos) == {f"out/{i}.mp4" for i in range(4, 200)}
    said = capsys.readouterr().out
    assert "--exclude: 5 names, 1 of them match no video" in said


# ---- Stop and go on -------------------------------------------------------------------


@pytest.mark.parametrize("epochs_before_kill", [0, 3])
def test_resume_after_sigkill_is_exact(uninterrupted, tmp_path, epochs_before_kill):
    """Catches anything that a kill loses: weights, moments, schedule, randomness."""
    folder, _ = uninterrupted
    (tmp_path / "out.npz").write_bytes((folder / "out.npz").read_bytes())
    flags = ("--epochs", 6)
    process = subprocess.Popen(
        command(*flags), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "lvmae.jsonl"
    while not log.exists() or len(read_log(tmp_path)) < epochs_before_kill:
        time.sleep(0.005)
        assert process.poll() in (None, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(tmp_path, *flags, "--resume")
    assert read_log(tmp_path) == read_log(folder)
    whole, again = (
        torch.load(path / "lvmae.pt", weights_only=True)["model"]
        for path in (folder, tmp_path)
    )
    for name in whole:
        assert torch.equal(whole[name], again[name]), name


def cut_to_epoch(path, epoch, **changes):
    """Make a checkpoint say that it is of an earlier epoch."""
    checkpoint = torch.load(path, weights_only=True)
    log = [line for line in checkpoint["log"] if line.get("epoch", 0) <= epoch]
    torch.save(checkpoint | {"epoch": epoch, "log": log} | changes, path)


def test_a_finished_run_stays_as_it_is(copy, capsys):
    """Catches --resume that trains on after the last epoch, or fails."""
    before = Path("lvmae.pt").read_bytes()
    run_here("--epochs", 6, "--resume")
    assert Path("lvmae.pt").read_bytes() == before
    assert "lvmae.pt: 6 epochs" in capsys.readouterr().out


def test_resume_with_a_flag_that_is_newer_than_the_checkpoint(copy):
    """Catches older checkpoints that no new version of train.py goes on with."""
    checkpoint = torch.load("lvmae.pt", weights_only=True)
    del checkpoint["args"]["input_scale"]
    torch.save(checkpoint, "lvmae.pt")
    cut_to_epoch("lvmae.pt", 5)
    run_here("--epochs", 6, "--resume")
    assert len(read_log(copy)) == 6


def test_optimizer_of_other_shapes_is_refused(copy):
    """Catches moments that crash the process, since fused AdamW does not look."""
    state = torch.load("lvmae.pt", weights_only=True)["optimizer"]
    moment = state["state"][0]["exp_avg"]
    for wrong in (torch.zeros(3), torch.zeros(1).expand_as(moment)):
        state["state"][0]["exp_avg"] = wrong
        cut_to_epoch("lvmae.pt", 5, optimizer=state)
        with pytest.raises(SystemExit, match="optimizer: found .*exp_avg of cls_token"):
            run_here("--epochs", 6, "--resume")


def test_resume_needs_the_same_encoder_and_a_whole_checkpoint(copy):
    """Catches weights of one encoder that are trained on with embeddings of another."""
    cut_to_epoch("lvmae.pt", 5, encoder={"model": "another"})
    with pytest.raises(SystemExit, match="lvmae.pt: encoder: not those of the data"):
        run_here("--epochs", 6, "--resume")
    checkpoint = torch.load("lvmae.pt", weights_only=True)
    for key in ("videos", "epoch", "log", "args", "optimizer"):
        kept = {name: value for name, value in checkpoint.items() if name != key}
        torch.save(kept, "lvmae.pt")
        with pytest.raises(SystemExit, match="lvmae.pt: "):
            run_here("--epochs", 6, "--resume")


def test_resume_needs_the_same_embeddings(copy):
    """Catches a run that goes on with other embeddings of videos of the same names."""
    cut_to_epoch("lvmae.pt", 5)
    with np.load("out.npz") as file:
        arrays = dict(file)
    arrays["embeddings"] = -arrays["embeddings"]
    np.savez("out.npz", **arrays)
    with pytest.raises(SystemExit, match="lvmae.pt: embeddings: not those of the data"):
        run_here("--epochs", 6, "--resume")


def test_starting_anew_says_what_it_replaces(copy, capsys):
    """Catches a checkpoint of hours that is replaced without a word."""
    run_here("--epochs", 1)
    assert "lvmae.pt: there already, and will be replaced" in capsys.readouterr().out


def test_a_run_of_warm_up_alone_is_named(copy, capsys):
    """Catches short runs that never reach their rate, and nobody is told."""
    run_here("--epochs", 2, "--warmup-epochs", 2)
    assert "2 epochs, all of them in --warmup-epochs" in capsys.readouterr().out


def test_a_killed_run_leaves_nothing_behind_for_good(copy):
    """Catches a temporary file for every run that was killed while it wrote."""
    Path("lvmae.pt.0.tmp").write_text("half of a checkpoint")
    cut_to_epoch("lvmae.pt", 5)
    run_here("--epochs", 6, "--resume")
    assert not list(copy.glob("*.tmp"))


# ---- Several processes ----------------------------------------------------------------


def test_two_processes(uninterrupted, tmp_path, monkeypatch):
    """Catches processes that part, count a video twice, or see other validation masks."""
    folder, _ = uninterrupted
    (tmp_path / "out.npz").write_bytes((folder / "out.npz").read_bytes())
    run(tmp_path, "--epochs", 6, "--batch-size", 8, processes=2)
    log = read_log(tmp_path)
    losses = [line["loss"] for line in log]
    assert np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0]
    two, one = (
        torch.load(path / "lvmae.pt", weights_only=True) for path in (tmp_path, folder)
    )
    assert two["videos"] == one["videos"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lvmae.jsonl",
        "lvmae.pt",
        "out.npz",
    ]

    # One process that evaluates the same checkpoint finds the same figures.
    monkeypatch.chdir(tmp_path)
    args = train.get_args([*SMALL.split(), "--epochs", "6"])
    model = LVMAE(LVMAEConfig(**two["config"]))
    model.load_state_dict(two["model"])
    videos, names, *_ = train.read_videos(args, 0, 1)
    _, numbers = train.split(len(names), args.val_share, args.seed)
    batches = train.validation_batches({i: videos[i] for i in numbers}, args)
    found = train.evaluate(model, batches, torch.device("cpu"))
    for key, value in found.items():
        assert value == pytest.approx(log[-1][key], abs=1e-6)

    # Another number of processes goes on where these stopped.
    cut_to_epoch("lvmae.pt", 5)
    run(tmp_path, "--epochs", 6, "--batch-size", 16, "--resume")
    assert len(read_log(tmp_path)) == 6


STEP = """
import sys, torch, train
from torch.nn.parallel import DistributedDataParallel
rank, world = train.read_rank()
args = train.get_args(sys.argv[2:])
model = train.build_model(args, 16)
net = model
batches = torch.load(f"{world}.batches", weights_only=True)
if world > 1:
    torch.distributed.init_process_group("gloo")
    net = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters())
line = train.train_epoch(net, optimizer, [batches[rank]], 1, 1, args, world)
if rank == 0:
    torch.save([line["loss"], model.state_dict()], sys.argv[1])
if world > 1:
    torch.distributed.barrier()  # else one may go while the other still talks to it
    torch.distributed.destroy_process_group()
"""


def test_two_halves_of_a_batch_equal_the_whole(tmp_path):
    """Catches a mean of means: a process with few masked segments that counts as much."""
    (tmp_path / "step.py").write_text(STEP)
    lengths = torch.tensor([3, 4, 20, 19])
    embeddings = (
        torch.randn(4, 20, 16) * (torch.arange(20) < lengths[:, None])[..., None]
    )
    is_masked = MASKS["random"](embeddings, lengths, 0.5)
    batch = (embeddings, lengths, is_masked)
    torch.save([batch], tmp_path / "1.batches")
    halves = [tuple(x[:2] for x in batch), tuple(x[2:] for x in batch)]
    torch.save(halves, tmp_path / "2.batches")

    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    results = []
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(processes), "step.py", f"{processes}.pt"]
        flags = f"{SMALL} --epochs 1 --warmup-epochs 0 --batch-size {4 // processes}"
        command = [*launch, *flags.split()]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        results.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    (loss, one), (loss_of_two, two) = results
    assert loss == pytest.approx(loss_of_two, rel=1e-5)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4)


def test_shares_of_processes(tmp_path):
    """Catches a process that keeps all videos, and videos of a second file that are lost."""
    files = [write_npz(tmp_path / f"{i}.npz", videos=10, seed=i) for i in range(3)]
    args = train.get_args(["--data", *files])
    whole, names, *_ = train.read_videos(args, 0, 1)
    assert len(whole) == 30
    parts = [load_data(path) for path in files]
    expected = [video for part in parts for video in part.embeddings]
    for number, video in whole.items():
        assert torch.equal(video, expected[number])
        assert names[number] == parts[number // 10].videos[number % 10]
    seen = []
    for rank in range(4):
        videos, its_names, *_ = train.read_videos(args, rank, 4)
        assert its_names == names and len(videos) in (7, 8)
        for number, video in videos.items():
            assert torch.equal(video, whole[number])
            seen.append(number)
            size = video.untyped_storage().nbytes()
            assert size == video.numel() * 2  # a view would keep the whole file
    assert sorted(seen) == list(range(30))


# ---- Batches, masks, schedule ---------------------------------------------------------


def test_crops():
    """Catches crops that leave their video, have one segment, or cut short videos up."""
    videos = []
    for n in torch.arange(2, 40).repeat_interleave(200):
        videos.append(torch.arange(n)[:, None])
    crops = train.crop(videos, 20, train.seeded(0, 0))
    for video, part in zip(videos, crops, strict=True):
        assert 2 <= len(part) <= min(len(video), 20)
        assert torch.equal(part, video[part[0] : part[0] + len(part)])
    pairs = zip(videos, crops, strict=True)
    assert sum(len(part) == len(video) for video, part in pairs) > 2000
    last = crops[-200:]  # of videos of 39 segments
    assert {len(part) for part in last} >= {2, 20}
    assert any(part[0] == 0 for part in last) and any(part[-1] == 38 for part in last)


@pytest.mark.parametrize("mask", MASKS)
def test_validation_masks_depend_on_the_seed_alone(tmp_path, mask):
    """Catches validation masks that change with epoch, batch size or processes."""
    args = train.get_args(["--data", write_npz(tmp_path / "x.npz"), "--mask", mask])

    def masks_of(videos):
        found = {}
        for embeddings, lengths, is_masked in train.validation_batches(videos, args):
            for row, n, masked in zip(embeddings, lengths, is_masked, strict=True):
                found[row[:n].numpy().tobytes()] = masked[:n].tolist()
                assert not masked[n:].any()
        return found

    videos, *_ = train.read_videos(args, 0, 1)
    whole = masks_of(videos)
    assert len(whole) == 40 and masks_of(videos) == whole
    for rank in range(3):
        part = {number: videos[number] for number in videos if number % 3 == rank}
        for video, masked in masks_of(part).items():
            assert whole[video] == masked


def test_trivial_predictions_by_hand():
    """Catches a bar that is too low: wrong neighbours or weights, masked ones used."""
    x = torch.tensor([[0.0], [9.0], [9.0], [6.0], [9.0], [9.0]])[None]
    is_masked = torch.tensor([[False, True, True, False, True, False]])
    lengths = torch.tensor([5])  # the last one is padding
    guess = train.trivial_predictions(x, lengths, is_masked)
    mean, line, both = (guess[name][0, :5, 0].tolist() for name in train.TRIVIAL)
    assert mean == [3.0] * 5
    assert line == [0.0, 2.0, 4.0, 6.0, 6.0]
    assert both == [1.5, 2.5, 3.5, 4.5, 4.5]
    first_masked = torch.tensor([[True, False, True, False, True, False]])
    line = train.trivial_predictions(x, lengths, first_masked)["interpolation"]
    assert line[0, :5, 0].tolist() == [9.0, 9.0, 7.5, 6.0, 6.0]


def test_learning_rate_by_hand():
    """Catches a schedule without MAE's rule, its warm-up, or its decay to zero."""
    flags = "--epochs 150 --warmup-epochs 40 --base-lr 1.5e-4"
    args = train.get_args(flags.split())
    peak = 1.5e-4 * 16 * 8 / 256
    expected = {0: 0, 20: peak / 2, 40: peak, 95: peak / 2, 150: 0}
    for epoch, lr in expected.items():
        assert train.learning_rate(epoch, args, world=8) == pytest.approx(lr, abs=1e-12)


def test_optimizer_of_table_5():
    """Catches weight decay on biases and norms, or other moments than Table 5."""
    model = LVMAE(LVMAEConfig(8, 1, 2, 8, 1, 2))
    decay, free = train.make_optimizer(model, train.get_args([])).param_groups
    assert {p.ndim for p in free["params"]} == {1} and free["weight_decay"] == 0
    assert {p.ndim for p in decay["params"]} == {2, 3} and decay["weight_decay"] == 0.05
    assert decay["betas"] == (0.9, 0.95)


# ---- Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--base-lr 1e30", "--base-lr 1e38 --epochs 1"])
def test_not_a_number_is_never_saved(copy, flags):
    """Catches a broken run that overwrites the last good checkpoint, or its log."""
    before = Path("lvmae.pt").read_bytes(), Path("lvmae.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="nan.*lower --base-lr"):
        run_here("--epochs", 2, "--warmup-epochs", 0, *flags.split())
    assert before == (Path("lvmae.pt").read_bytes(), Path("lvmae.jsonl").read_bytes())


def test_broken_weights_of_the_last_step_are_not_saved(copy, monkeypatch):
    """Catches a check of the loss alone, which is of the time before the last step."""
    before = Path("lvmae.pt").read_bytes()
    epoch = train.train_epoch

    def break_weights(net, *rest):
        line = epoch(net, *rest)
        torch.nn.init.constant_(net.norm.bias, float("nan"))
        return line

    monkeypatch.setattr(train, "train_epoch", break_weights)
    with pytest.raises(SystemExit, match="not saved"):
        run_here("--epochs", 2, "--val-share", 0)
    assert Path("lvmae.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data missing.npz", "missing.npz: found FileNotFound"),
        ("--heads 3", "--heads.*width 16, 3 heads"),
        ("--resume --depth 2", "lvmae.pt: made with --depth 1, found 2"),
        ("--resume --data other.npz", "lvmae.pt: videos: not those of the data"),
        ("--resume --batch-size 8", "made with --batch-size x processes 16, found 8"),
        ("--data tiny.npz", "tiny.npz.*: 1 videos: too few"),
        ("--data out.npz wide.npz", "embeddings of different sizes"),
        ("--exclude missing.txt", "missing.txt: found .*expected names"),
        ("--exclude notes.jsonl", "--exclude: 1 names, 1 of them match no video"),
        ("--data out.npz out.npz", "a video is there twice"),
        ("--out text.pt", "text.pt: there, and no .pt file"),
        ("--out out.npz", "out.npz: expected a name that ends in .pt"),
        ("--data data.pt --out data.pt", "data.pt: would replace an input"),
        ("--out notes.pt", "notes.jsonl: there, but not notes.pt"),
        ("--out folder.pt", "folder.pt: there, and no regular file"),
    ],
)
def test_errors_are_one_line(copy, flags, message):
    """Catches a traceback, or a lost file, where a line that names the fault would do."""
    write_npz(copy / "other.npz", videos=200, seed=1)
    write_npz(copy / "tiny.npz", videos=1)
    write_npz(copy / "wide.npz", D=32)
    Path("data.pt").write_bytes(Path("out.npz").read_bytes())
    Path("notes.jsonl").write_text("{mine}")
    Path("text.pt").write_text("mine")
    Path("folder.pt").mkdir()
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    with pytest.raises(SystemExit, match=message) as error:
        run_here("--epochs", 6, *flags.split())
    assert "\n" not in str(error.value)
    assert before == {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    "flags",
    [
        "--mask-ratio 1",
        "--mask-ratio 0",
        "--batch-size 0",
        "--max-segments 1",
        "--base-lr nan",
        "--base-lr inf",
        "--weight-decay nan",
        "--warmup-epochs nan",
        "--val-share 1",
        "--heads 0",
        "--depth -1",
        "--epochs 1.5",
        "--input-scale 1e18",
    ],
)
def test_flags_out_of_range(flags):
    """Catches a flag that makes no sense and is used."""
    with pytest.raises(SystemExit):
        train.get_args(flags.split())


def test_two_encoders_are_said(tmp_path, capsys):
    """Catches files of different encoders that become one training set in silence."""
    files = []
    for name in ("A", "B"):
        meta = np.array(json.dumps({"model": name}))
        files.append(write_npz(tmp_path / f"{name}.npz", meta=meta))
    args = train.get_args(["--data", *files])
    train.read_videos(args, 0, 1)
    assert "B.npz: model B, but" in capsys.readouterr().err
    train.read_videos(train.get_args(["--data", files[0]]), 0, 1)
    assert capsys.readouterr().err == ""


def heed_sigint():
    """In a child: Ctrl-C works, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_with_one_line(uninterrupted, tmp_path):
    """Catches a traceback after Ctrl-C."""
    folder, _ = uninterrupted
    (tmp_path / "out.npz").write_bytes((folder / "out.npz").read_bytes())
    process = subprocess.Popen(
        command("--epochs", 10_000),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_sigint,
    )
    while not (tmp_path / "lvmae.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip().splitlines()[-1].startswith("stopped: the same command")
    assert "Traceback" not in said
