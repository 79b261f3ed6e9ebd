"""Tests of probe.py: labels, splits without leaks, heads, training, the command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import probe
from model import LVMAE, LVMAEConfig, load_checkpoint, load_data

CPU = torch.device("cpu")
HEADS = list(probe.HEADS.values())


def write_npz(path, videos, labels=None, lengths=None, dim=16, seed=0):
    """Make an npz in which the mean embedding of a video tells its label."""
    rng = np.random.default_rng(seed)
    if labels is None:
        labels = [""] * len(videos)
    if lengths is None:
        lengths = rng.integers(1, 6, len(videos))
    center = {label: rng.normal(size=dim) for label in sorted(set(labels))}
    rows = []
    for label, n in zip(labels, lengths, strict=True):
        rows.append(center[label] + 0.5 * rng.normal(size=(n, dim)))
    rows = np.concatenate(rows)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.savez(
        path,
        embeddings=rows.astype(np.float16),
        lengths=np.array(lengths),
        videos=np.array(videos),
        labels=np.array(labels),
    )
    return path


def write_checkpoint(path, dim=16, scale=1.0, **more):
    """Save a tiny untrained LV-MAE as train.py does, as far as load_checkpoint reads it."""
    torch.manual_seed(0)
    config = LVMAEConfig(
        dim=dim,
        depth=1,
        heads=2,
        decoder_dim=8,
        decoder_depth=1,
        decoder_heads=2,
        max_segments=8,
    )
    state = LVMAE(config).state_dict()
    state["norm.weight"] *= scale
    torch.save({"model": state, "config": vars(config), **more}, path)
    return path


def write_classes(folder, n=45, names="abc"):
    """An npz of n videos in folders, one a class, and the names of the videos."""
    videos = [f"{names[i % len(names)]}/{i}.mp4" for i in range(n)]
    write_npz(folder / "out.npz", videos, labels=[video[0] for video in videos])
    return videos


def write_csv(path, rows, header="video,label,split"):
    """Write a CSV of labels."""
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def read(path, videos):
    """Labels of a CSV or the folders, for made-up data of these videos."""
    data = load_data(write_npz(Path(path).parent / "labels.npz", videos))
    rows = probe.read_labels(str(path), data)
    return probe.find_videos(rows, data, path)


def run_probe(*flags):
    """Run probe.py in this process, in the present folder."""
    probe.main(probe.get_args(["--device", "cpu", *map(str, flags)]))


def error_of(*flags):
    """Run a command that must fail, with a message of one line."""
    with pytest.raises(SystemExit) as error:
        run_probe(*flags)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


# ---- Labels ----------------------------------------------------------------------------


def test_names_of_a_csv_find_their_videos(tmp_path, capsys):
    """Catches names lost with a folder or ending, and losses that nobody counts."""
    videos = ["a/one.x.mp4", "a/two.mp4", "b/two.mp4", "three.mp4", "c/four.mp4"]
    videos += ["c/three.mp4"]
    names = ["one.x", "a/two", "three.mp4", "c/four.mp4", "gone"]
    path = write_csv(tmp_path / "l.csv", [f"{name},L" for name in names], "video,label")
    assert read(path, videos) == dict.fromkeys([0, 1, 3, 4], ("L", "train"))
    printed = capsys.readouterr().out
    assert "2 videos have no label: b/two.mp4, c/three.mp4\n" in printed
    assert "1 labels have no video: gone\n" in printed


@pytest.mark.parametrize(
    "rows, message",
    [
        (["two,L,"], "a/two.mp4 and b/two.mp4"),
        (["one,L,", "one.mp4,M,"], "has ('L', 'train') already"),
        (["one,L,train", "one,L,test"], "has ('L', 'train') already"),
        (["one,L,dev"], "train or val or test"),
        (["one"], "expected 3 cells"),
        ([",L,test"], "train or val or test"),
    ],
)
def test_doubtful_rows_are_refused(tmp_path, rows, message):
    """Catches a label given to the wrong video, or the last of two that wins."""
    path = write_csv(tmp_path / "l.csv", rows)
    with pytest.raises(SystemExit) as error:
        read(path, ["one.mp4", "a/two.mp4", "b/two.mp4"])
    assert message in str(error.value) and "l.csv" in str(error.value)


def test_names_are_cut_at_line_ends_only(tmp_path):
    """Catches rows cut in two by U+2028 or a quoted line end, and a byte-order mark."""
    videos = ["a\u2028b.mp4", "c\nd.mp4", "e,f.mp4"]
    rows = ["\ufeffvideo,label", "a\u2028b.mp4,L", '"c\nd.mp4",M', '"e,f.mp4",N']
    (tmp_path / "l.csv").write_text("\n".join(rows), encoding="utf-8")
    found = read(tmp_path / "l.csv", videos)
    assert found == {0: ("L", "train"), 1: ("M", "train"), 2: ("N", "train")}


@pytest.mark.parametrize(
    "text", ["clip,score\n1,3\n", "", "video label\n1 x\n", b"\xff\xfe\x00"]
)
def test_foreign_files_end_in_one_line(tmp_path, text):
    """Catches a table from a file that is no CSV of labels, or a traceback."""
    path = tmp_path / "l.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    write_npz(tmp_path / "out.npz", ["1.mp4", "2.mp4"])
    error = error_of("--data", tmp_path / "out.npz", "--labels", path)
    assert "l.csv" in error
    assert "nowhere.csv" in error_of(
        "--data", tmp_path / "out.npz", "--labels", tmp_path / "nowhere.csv"
    )


def test_class_without_training_video_is_left_out(tmp_path, capsys):
    """Catches a partial download that stops a whole task, and a silent loss of a class."""
    labelled = {0: ("a", "train"), 1: ("b", "train"), 2: ("c", "test"), 3: ("c", "val")}
    assert sorted(probe.drop_untrained(labelled)) == [0, 1]
    assert "class c, 2 videos" in capsys.readouterr().out


def test_numbers_must_be_numbers(tmp_path, monkeypatch):
    """Catches a table of NaN, or of a word taken for a number."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", [f"{i}.mp4" for i in range(20)])
    for word in ("nan", "inf", "1e999", "many"):
        rows = [f"{i},{i}" for i in range(1, 20)]
        path = write_csv(Path("l.csv"), [f"0,{word}", *rows], "video,label")
        assert "l.csv" in error_of("--labels", path, "--regression")


# ---- Splits ----------------------------------------------------------------------------


def split_of(labelled, *flags, seed=0):
    """Split of made-up labels, as lists."""
    named = {part for _, part in labelled.values()}
    split = probe.make_split(labelled, named, probe.get_args(flags), seed)
    return {part: videos.tolist() for part, videos in split.items()}


def test_split_is_stratified_and_disjoint():
    """Catches a video in two parts, a class cut unevenly, a seed that decides nothing."""
    labelled = {i: ("ab"[i % 2], "train") for i in range(40)}
    split = split_of(labelled)
    assert sorted(sum(split.values(), [])) == list(range(40))
    for part, n in {"train": 12, "val": 4, "test": 4}.items():
        classes = [i % 2 for i in split[part]]
        assert classes.count(0) == classes.count(1) == n
    assert split == split_of(labelled) and split != split_of(labelled, seed=1)


def test_named_split_is_kept():
    """Catches published test videos that are trained on."""
    labelled = {i: ("ab"[i % 2], "test" if i < 10 else "train") for i in range(40)}
    split = split_of(labelled)
    assert sorted(split["test"]) == list(range(10))
    assert len(split["val"]) == 6
    assert sorted(split["train"] + split["val"]) == list(range(10, 40))

    labelled = {i: ("ab"[i % 2], ("train", "val", "test")[i % 3]) for i in range(30)}
    for part, videos in split_of(labelled).items():
        assert len(videos) == 10
        assert all(labelled[i][1] == part for i in videos)


def test_val_share_is_the_readers_choice():
    """Catches published training videos that are withheld though the reader said 0."""
    labelled = {i: ("ab"[i % 2], "test" if i < 10 else "train") for i in range(40)}
    split = split_of(labelled, "--val-share", "0")
    assert split["val"] == [] and sorted(split["train"]) == list(range(10, 40))
    assert len(split_of(labelled, "--val-share", "0.4")["val"]) == 12
    labelled[10] = ("a", "val")  # now there is one: nothing else is cut off
    assert split_of(labelled, "--val-share", "0.4")["val"] == [10]


def test_numbers_are_split_as_one_group():
    """Catches numbers taken for classes of one video, which are never tested."""
    labelled = {i: (str(i), "train") for i in range(40)}
    split = split_of(labelled, "--regression")
    assert [len(split[part]) for part in ("train", "val", "test")] == [24, 8, 8]


def test_small_classes_keep_a_training_video():
    """Catches a class all of whose videos are cut off."""
    labels = ["a"] * 10 + ["b"] * 3
    labelled = {i: (label, "train") for i, label in enumerate(labels)}
    split = split_of(labelled, "--val-share", "0.5")
    assert {labels[i] for i in split["train"]} == {"a", "b"}
    assert [labels[i] for i in split["val"]].count("b") == 2


@pytest.mark.parametrize(
    "rows, message",
    [
        (["0,a,", "1,a,", "2,a,"], "classes ['a']"),
        (["0,a,train", "1,b,train", "2,a,val"], "no video to test"),
        (["0,a,train", "1,b,train", "2,a,test"], "no video to val"),
        (["0,a,test", "1,b,test"], "classes []"),
        (["0,a,train", "1,b,train", "2,b,val", "gone,a,test"], "no video to test"),
        (["0,a,train", "1,b,train", "2,c,test", "gone,a,val"], "no video to val"),
        ([], "classes []"),
    ],
)
def test_split_errors(tmp_path, monkeypatch, rows, message):
    """Catches a score of one class, or on no video."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", ["0.mp4", "1.mp4", "2.mp4"])
    assert message in error_of("--labels", write_csv(Path("l.csv"), rows))


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_split_that_labels_name_is_never_made_up(tmp_path, monkeypatch, part):
    """Catches training videos cut off in place of published ones that are not there."""
    monkeypatch.chdir(tmp_path)
    videos = write_classes(tmp_path, 40, "ab")
    labels = write_csv(
        Path("l.csv"), [*(f"{v},{v[0]}," for v in videos), f"no,a,{part}"]
    )
    assert f"no video to {part}" in error_of("--labels", labels)


# ---- Features and heads ----------------------------------------------------------------


def test_features_are_whole_videos(tmp_path):
    """Catches videos cut at max_segments, a lost [CLS], rows mixed up in a batch."""
    names = [str(i) for i in range(40)]
    lengths = [3, 20, 1, 7] * 10
    data = load_data(write_npz(tmp_path / "out.npz", names, lengths=lengths))
    model, _ = load_checkpoint(write_checkpoint(tmp_path / "c"), data, CPU)
    chosen = list(range(39, 1, -1))
    features = probe.encode(model, data.embeddings, chosen, CPU)
    assert list(features) == chosen
    for i, found in features.items():
        video = data.embeddings[i]
        n = len(video)
        expected = model.encode(video[None].float(), torch.tensor([n]))[0]
        assert found.shape == (n + 1, 16)
        assert torch.allclose(found.float(), expected, atol=3e-3)


def test_labelled_videos_alone_are_encoded(tmp_path, monkeypatch):
    """Catches 9,996 videos encoded for a task of 950."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", [f"{i}.mp4" for i in range(60)])
    write_checkpoint("lvmae.pt")
    encoded = []
    encode = probe.encode
    monkeypatch.setattr(
        probe, "encode", lambda *args: encoded.extend(args[2]) or encode(*args)
    )
    labels = write_csv(Path("l.csv"), [f"{i},{'ab'[i % 2]}," for i in range(20)])
    run_probe("--labels", labels, "--runs", 1, "--epochs", 1)
    assert encoded == list(range(20))


def make_head(Head):
    """A head whose output depends on its input: the last layer is zero at first."""
    torch.manual_seed(0)
    head = Head(16, 3).eval()
    torch.nn.init.normal_(head.last[1].weight)
    return head


@pytest.mark.parametrize("Head", HEADS)
def test_heads_ignore_padding(Head):
    """Catches heads that see padding or neighbours, or miss a segment, the last above all."""
    head = make_head(Head)
    is_token = torch.arange(9) < torch.tensor([[9], [6]])
    x = torch.randn(2, 9, 16) * is_token[..., None]
    together = head(x, is_token)[1]
    alone = head(x[1:, :6], is_token[1:, :6])[0]
    assert torch.allclose(together, alone, atol=1e-5)
    for row in range(1, 6):
        changed = x[1:, :6].clone()
        changed[0, row] *= -1
        assert not torch.allclose(head(changed, is_token[1:, :6])[0], alone, atol=1e-4)


@pytest.mark.parametrize("Head", HEADS)
def test_order_is_seen_by_the_end_to_end_heads_only(Head):
    """Catches positions in the baseline of Tables 1 and 2, or none end to end."""
    head = make_head(Head)
    x = torch.randn(1, 9, 16)
    reverse = torch.cat([x[:, :1], x[:, 1:].flip(1)], dim=1)
    is_token = torch.ones(1, 9, dtype=torch.bool)
    is_same = torch.allclose(head(x, is_token), head(reverse, is_token), atol=1e-4)
    assert is_same == (Head in (probe.LinearProbe, probe.AttentiveProbe))


def test_attentive_is_a_whole_transformer_layer():
    """Catches a shortcut that is not what PyTorch's pre-norm layer gives at [CLS]."""
    head = make_head(probe.AttentiveProbe)
    torch.nn.init.normal_(head.cls_token)
    layer = torch.nn.TransformerEncoderLayer(
        16, 8, 64, 0.0, "gelu", batch_first=True, norm_first=True
    )
    layer.self_attn.load_state_dict(head.attention.state_dict())
    layer.linear1.load_state_dict(head.mlp.fc1.state_dict())
    layer.linear2.load_state_dict(head.mlp.fc2.state_dict())
    for norm in (head.norm1, head.norm2, layer.norm1, layer.norm2):
        torch.nn.init.constant_(norm.weight, 1.5)
        torch.nn.init.constant_(norm.bias, 0.1)
    x = torch.randn(2, 7, 16)
    is_token = torch.arange(7) < torch.tensor([[7], [4]])
    found = head(x, is_token)
    x[:, 0] += head.cls_token
    expected = layer(x, src_key_padding_mask=~is_token)[:, 0]
    assert torch.allclose(found, head.last(expected), atol=1e-4)


def test_selective_scan_is_the_recurrence():
    """Catches a matrix product that is not the state carried from step to step."""
    torch.manual_seed(0)
    B, T, H, P, K = 2, 7, 3, 4, 5
    x = torch.randn(B, T, H, P)
    b = torch.randn(B, T, K)
    c = torch.randn(B, T, K)
    delta = torch.rand(B, T, H) * 3
    rate = torch.rand(H) * 9
    y = probe.selective_scan(x, delta, rate, b, c)
    for i in range(B):
        for h in range(H):
            state = torch.zeros(K, P)
            for t in range(T):
                decay = math.exp(-rate[h] * delta[i, t, h])
                new = delta[i, t, h] * torch.outer(b[i, t], x[i, t, h])
                state = decay * state + new
                assert torch.allclose(y[i, t, h], c[i, t] @ state, atol=1e-4)


def test_selective_scan_forgets_without_overflow():
    """Catches exp of the future: with long videos and fast decay it is infinite."""
    x = torch.randn(1, 400, 1, 2, requires_grad=True)
    ones = torch.ones(1, 400, 3)
    delta = torch.full((1, 400, 1), 5.0)
    y = probe.selective_scan(x, delta, torch.tensor([9.0]), ones, ones)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


class Nearest(torch.nn.Module):
    """A head that somebody adds: the class of the training video of nearest average."""

    setting = None

    def __init__(self, dim, outputs):
        super().__init__()

    def remember(self, videos, targets):
        self.means = torch.stack([video[1:].float().mean(0) for video in videos])
        self.targets = targets

    def forward(self, x, is_token):
        distance = torch.cdist(probe.average(x, is_token), self.means)
        return self.targets[distance.argmin(1)]


def test_a_head_without_training_is_a_row(tmp_path, monkeypatch, capsys):
    """Catches a table that only takes heads trained by gradient."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path)
    rows = [
        probe.Row("majority", probe.Majority, "raw"),
        probe.Row("raw nearest", Nearest, "raw"),
    ]
    monkeypatch.setattr(probe, "ROWS", rows)
    run_probe("--compare", "--runs", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["majority", "33.33", "+-", "0.00"]
    assert lines[2].startswith("raw nearest") and float(lines[2].split()[2]) > 80


class Recorder(torch.nn.Module):
    """A head that lists the devices of what it is given."""

    setting = None

    def __init__(self, dim, outputs):
        super().__init__()
        self.register_buffer("own", torch.zeros(outputs))

    def remember(self, videos, targets):
        self.devices = {self.own.device, targets.device}
        self.devices.update(video.device for video in videos)


def test_a_head_without_training_is_on_the_device():
    """Catches remembered tensors on the CPU and a head that is asked on another device."""
    features, targets, split = make_task()
    args = probe.get_args([])
    train = split["train"]
    meta = torch.device("meta")  # as good as a GPU: it does not mix with the CPU
    head = probe.fit(Recorder, features, targets, train, split["val"], args, meta)
    assert head.devices == {meta}


# ---- Training --------------------------------------------------------------------------


def make_task(n=60):
    """Features of one segment, whose sign is the class, and the split of n videos."""
    torch.manual_seed(0)
    classes = torch.arange(n) % 2
    targets = torch.nn.functional.one_hot(classes).float()  # (n, 2)
    features = {}
    for i in range(n):
        x = torch.randn(1, 16) * 0.7 + (2 * classes[i] - 1)
        features[i] = torch.nn.functional.pad(x, (0, 0, 1, 0))
    parts = torch.arange(n).split([n // 2, n // 4, n // 4])
    return features, targets, dict(zip(("train", "val", "test"), parts, strict=True))


@pytest.mark.parametrize("Head", HEADS)
def test_test_labels_reach_nothing_but_the_score(Head):
    """Catches a choice of the epoch on test: swapped labels must swap the score."""
    features, targets, split = make_task()
    args = probe.get_args(["--epochs", "6"])
    swapped = targets.clone()
    swapped[split["test"]] = 1 - targets[split["test"]]
    scores = []
    for labels in (targets, swapped):
        torch.manual_seed(0)
        scores.append(probe.run(Head, features, labels, split, args, CPU))
    assert sum(scores) == pytest.approx(100)


def record_evaluations(monkeypatch, scores):
    """Make evaluate return these scores, one a call; list the weights it was called with."""
    weights = []

    def evaluate(head, *args):
        weights.append(head.last[1].weight.detach().clone())
        return scores[len(weights) - 1]

    monkeypatch.setattr(probe, "evaluate", evaluate)
    return weights


def test_best_epoch_on_validation_is_kept(monkeypatch):
    """Catches the last epoch or rate kept, or a best one that training goes on with."""
    scores = [(0.5, 1.0), (0.2, 0.9), (0.2, 0.8), (0.4, 0.1)] + 8 * [(0.3, 0.0)]
    weights = record_evaluations(monkeypatch, scores)
    features, targets, split = make_task()
    args = probe.get_args(["--epochs", "4"])
    train = split["train"]
    head = probe.fit(
        probe.LinearProbe, features, targets, train, split["val"], args, CPU
    )
    assert len(weights) == 12  # three rates
    assert torch.equal(head.last[1].weight, weights[2])
    assert not torch.equal(weights[2], weights[3])


def test_without_validation_the_last_epoch_is_kept(monkeypatch):
    """Catches a choice where there is nothing to choose by: the paper's rate holds."""
    features, targets, split = make_task()
    none = torch.tensor([], dtype=torch.long)
    found = []
    for flags in (["--epochs", "3"], ["--epochs", "3", "--lr", "1e-4"]):
        torch.manual_seed(0)
        args = probe.get_args(flags)
        train = split["train"]
        head = probe.fit(probe.LinearProbe, features, targets, train, none, args, CPU)
        found.append(head.last[1].weight)
    assert torch.equal(*found) and found[0].abs().sum() > 0


def test_regression_is_scored_in_its_own_unit():
    """Catches a target far from zero that is not learned, or the normalised error."""
    torch.manual_seed(0)
    features = {i: torch.randn(2, 16) for i in range(120)}
    targets = torch.stack([1000 + 50 * features[i][1, :1] for i in range(120)])
    parts = torch.arange(120).split([80, 20, 20])
    split = dict(zip(("train", "val", "test"), parts, strict=True))
    args = probe.get_args(["--lr", "0.01"])
    mean = probe.run(probe.Majority, features, targets, split, args, CPU)
    error = (targets[100:] - targets[:80].mean()).square().mean().item()
    assert mean == pytest.approx(error, rel=1e-3)
    linear = probe.run(probe.LinearProbe, features, targets, split, args, CPU)
    assert linear < mean / 5


# ---- The command line ------------------------------------------------------------------


def test_compare(tmp_path, monkeypatch, capsys):
    """Catches rows, n or the file that differ from what is printed, or from run to run."""
    videos = write_classes(tmp_path)
    write_checkpoint(tmp_path / "lvmae.pt", videos=videos[:30])
    flags = ["--compare", "--runs", "2", "--epochs", "4", "--lr", "0.01"]
    flags += ["--json", "t.json", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, probe.__file__, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    table = json.loads((tmp_path / "t.json").read_text())
    assert (
        lines[0] == "2 runs; train 27, val 9, test 9 videos; 3 classes; accuracy in %"
    )
    assert list(table["rows"]) == [row.name for row in probe.ROWS]
    for line, (name, row) in zip(lines[2:], table["rows"].items(), strict=True):
        mean = f"{row['mean']:.2f}"
        assert line.split() == [*name.split(), mean, "+-", f"{row['std']:.2f}"]
        assert len(row["runs"]) == 2
    assert table["n"] == {"train": 27, "val": 9, "test": 9} and table["classes"] == 3
    assert table["rows"]["majority"]["mean"] == pytest.approx(100 / 3)
    assert table["rows"]["raw linear"]["mean"] > 80
    monkeypatch.chdir(tmp_path)
    probe.main(probe.get_args(flags))
    assert capsys.readouterr().out == result.stdout


def test_baseline_stands_beside_the_result(tmp_path, monkeypatch, capsys):
    """Catches a result that is not last, or without majority and the raw features."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path, 30, "ab")
    write_checkpoint("lvmae.pt")
    attentive = ["majority", "raw attentive", "LV-MAE attentive"]
    run_probe("--runs", 1, "--epochs", 1)
    printed = capsys.readouterr().out.splitlines()[2:]
    assert [line[:16].strip() for line in printed] == attentive
    run_probe("--runs", 1, "--epochs", 1, "--head", "mamba", "--ckpt", "none.pt")
    printed = capsys.readouterr().out.splitlines()[1:]
    assert [line[:16].strip() for line in printed] == ["majority", "mamba"]


def test_linear_is_the_head_of_numbers(tmp_path, monkeypatch, capsys):
    """Catches likes and views probed otherwise than in section 4.2."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", [f"{i}.mp4" for i in range(40)])
    write_checkpoint("lvmae.pt")
    labels = write_csv(Path("l.csv"), [f"{i},{i}.5," for i in range(40)])
    run_probe("--labels", labels, "--regression", "--runs", 1, "--epochs", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("mean squared error")
    assert lines[-1].startswith("LV-MAE linear")


def test_numbers_that_are_all_the_same(tmp_path, monkeypatch):
    """Catches an error of 0 for numbers that differ by rounding alone."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", [f"{i}.mp4" for i in range(40)])
    write_checkpoint("lvmae.pt")
    labels = write_csv(Path("l.csv"), [f"{i},0.1," for i in range(40)])
    with pytest.raises(SystemExit, match="all numbers to train on are the same"):
        run_probe("--labels", labels, "--regression", "--runs", 1, "--epochs", 1)


@pytest.mark.parametrize("known, expected", [(0, "0"), (10, "10"), (None, "unknown")])
def test_leakage_is_counted(tmp_path, monkeypatch, capsys, known, expected):
    """Catches test videos of the pre-training that nobody mentions."""
    monkeypatch.chdir(tmp_path)
    videos = write_classes(tmp_path, 40, "ab")
    rows = [f"{v},{v[0]},{'test' if i < 10 else 'train'}" for i, v in enumerate(videos)]
    more = {} if known is None else {"videos": [*videos[:known], "z/0.mp4", "9"]}
    write_checkpoint("lvmae.pt", **more)
    labels = write_csv(Path("l.csv"), rows)
    run_probe("--labels", labels, "--runs", 1, "--epochs", 1, "--json", "t.json")
    line = f"{expected} of 10 test videos were in the pre-training"
    assert line in capsys.readouterr().out.splitlines()
    found = json.loads(Path("t.json").read_text())
    assert str(found["seen"]) == expected and found["tested"] == 10


def test_what_is_not_finite_is_no_table(tmp_path, monkeypatch, capsys):
    """Catches an accuracy of NaN predictions: argmax finds a class in them."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path, 40, "ab")
    write_checkpoint("lvmae.pt", scale=1e30)
    error = error_of("--runs", 1, "--epochs", 1, "--json", "t.json")
    assert "not finite" in error and not Path("t.json").exists()
    assert "LV-MAE" not in capsys.readouterr().out
    write_checkpoint("lvmae.pt", scale=math.nan)
    assert "lvmae.pt" in error_of("--runs", 1, "--epochs", 1)


@pytest.mark.parametrize(
    "flags",
    ["--lr 0", "--lr nan", "--lr inf", "--epochs 0", "--runs 0", "--seed -1"]
    + ["--val-share 1", "--val-share nan", "--head majority"],
)
def test_impossible_flags_are_refused(flags, capsys):
    """Catches a rate or number of epochs of 0 that means the default."""
    with pytest.raises(SystemExit) as error:
        probe.get_args(flags.split())
    assert error.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_json_is_checked_before_any_work(tmp_path, monkeypatch, capsys):
    """Catches a table that replaces an input, or is lost after an hour of training."""
    monkeypatch.chdir(tmp_path)
    videos = write_classes(tmp_path, 30, "ab")
    write_checkpoint("lvmae.pt")
    Path("labels.json").write_text("video,label\n" + f"{videos[0]},a\n")
    before = Path("labels.json").read_bytes()
    Path("folder.json").mkdir()
    Path("file").write_text("")
    for path in ("out.npz", "lvmae.pt", "labels.json", "folder.json", "file/t.json"):
        assert path in error_of("--labels", "labels.json", "--json", path)
    assert capsys.readouterr().out == ""
    assert Path("labels.json").read_bytes() == before
    load_data("out.npz")


def test_wrong_inputs_end_in_one_line(tmp_path, monkeypatch):
    """Catches a traceback for a missing checkpoint, or one of another size."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path, 30, "ab")
    assert "lvmae.pt" in error_of("--runs", 1)
    write_checkpoint("lvmae.pt", dim=32)
    assert "32" in error_of("--runs", 1)


def test_a_column_of_another_name_is_refused(tmp_path, monkeypatch):
    """Catches a column Split that is ignored, and a random split in its place."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", [f"{i}.mp4" for i in range(20)])
    rows = [f"{i},{i % 2},test" for i in range(20)]
    path = write_csv(Path("l.csv"), rows, "video,label,Split")
    assert "l.csv: columns ['video', 'label', 'Split']" in error_of("--labels", path)
    path = write_csv(Path("l.csv"), rows, "video,label")
    assert "expected 2 cells" in error_of("--labels", path)


def test_large_numbers_keep_their_digits(tmp_path, monkeypatch):
    """Catches numbers such as views in billions, rounded in single precision."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", [f"{i}.mp4" for i in range(20)])
    parts = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    rows = [f"{i},{10**9 + i},{part}" for i, part in enumerate(parts)]
    path = write_csv(Path("l.csv"), rows, "video,label,split")
    flags = ["--labels", path, "--regression", "--head", "linear", "--runs", "1"]
    write_checkpoint(Path("lvmae.pt"))
    probe.main(probe.get_args([*map(str, flags), "--json", "t.json"]))
    found = json.loads(Path("t.json").read_text())["rows"]["majority"]["mean"]
    expected = np.mean((np.arange(16, 20) - np.mean(np.arange(12))) ** 2)
    assert found == pytest.approx(expected, rel=1e-3)
