"""Tests of probe.py: labels as published, splits without leaks, heads, and the command line."""

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


def write_npz(path, videos, labels=None, lengths=None, dim=16, seed=0):
    """Make an npz in which the mean embedding of a video tells its label."""
    rng = np.random.default_rng(seed)
    labels = ["" for _ in videos] if labels is None else labels
    lengths = rng.integers(1, 6, len(videos)) if lengths is None else np.array(lengths)
    center = {label: rng.normal(size=dim) for label in sorted(set(labels))}
    each = zip(labels, lengths, strict=True)
    rows = np.concatenate(
        [center[x] + 0.5 * rng.normal(size=(n, dim)) for x, n in each]
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    arrays = dict(
        embeddings=rows.astype(np.float16), lengths=lengths, videos=np.array(videos)
    )
    np.savez(path, **arrays, labels=np.array(labels))
    return path


def write_checkpoint(path, dim=16, max_segments=8):
    """Save a tiny untrained LV-MAE as train.py does, as far as load_checkpoint reads it."""
    torch.manual_seed(0)
    config = LVMAEConfig(dim, 1, 2, 8, 1, 2, max_segments=max_segments)
    torch.save({"model": LVMAE(config).state_dict(), "config": vars(config)}, path)
    return path


def error_of(*flags):
    """Run a command that must fail, with a message of one line."""
    with pytest.raises(SystemExit) as error:
        probe.main(probe.get_args(["--device", "cpu", *map(str, flags)]))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Labels -------------------------------------------------------------------------------------


def test_lvu_files(tmp_path):
    """Ids that begin with '-', the class named \\N and the split of each file are kept."""
    header = "class_id class_name youtube_id imdb_id\n"
    (tmp_path / "train.csv").write_text(
        header + "0 \\N -a_b tt1\n1 nm0001220 --c tt2\n"
    )
    (tmp_path / "val.csv").write_text(header + "0 \\N -D3 tt3\n")
    (tmp_path / "test.csv").write_text(header + "1 nm0001220 0E tt4\n")
    rows = probe.read_labels(str(tmp_path), None)
    assert rows[:2] == [("-a_b", "\\N", "train"), ("--c", "nm0001220", "train")]
    assert rows[2:] == [("-D3", "\\N", "val"), ("0E", "nm0001220", "test")]


def test_lvu_numbers(tmp_path):
    """The like ratio is 10 * like / (like + dislike), views are logarithms: not the raw counts."""
    (tmp_path / "a.csv").write_text(
        "like_count dislike_count youtube_id imdb_id\n30 10 x tt1\n"
    )
    (tmp_path / "b.csv").write_text("view_count youtube_id imdb_id\n1000 -y tt1\n")
    assert probe.read_labels(str(tmp_path / "a.csv"), None) == [("x", 7.5, "")]
    assert probe.read_labels(str(tmp_path / "b.csv"), None) == [
        ("-y", math.log(1000), "")
    ]


def test_breakfast_file(tmp_path, capsys):
    """Ids with '-' find files named with '_', with '-', and in the folders of the data set."""
    text = "file_name,duration,action,class_id\nP03-cam01-P03_tea,56,tea,2\n"
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "test.csv").write_text(text.replace("03", "47"))
    rows = probe.read_labels(str(tmp_path), None)
    for separator in "_-/":
        names = (f"{p}{separator}cam01{separator}{p}_tea.avi" for p in ("P03", "P47"))
        found = probe.match(rows, list(names), "labels")
        assert found == {0: ("tea", "train"), 1: ("tea", "test")}


def test_breakfast_names(tmp_path):
    """Labels read off the names: the action, the published persons as test, one stereo channel."""
    videos = ["P03_cam01_P03_friedegg.avi", "P47_webcam02_P47_tea.avi", "holiday.avi",
              "P47/stereo/P47_milk_ch0.avi", "P47/stereo/P47_milk_ch1.avi"]  # fmt: skip
    rows = probe.read_labels(
        "breakfast", load_data(write_npz(tmp_path / "o.npz", videos))
    )
    parts = [("friedegg", "train"), ("tea", "test"), ("milk", "test")]
    assert rows == [
        (videos[i], *part) for i, part in zip((0, 1, 3), parts, strict=True)
    ]


def test_coin_json(tmp_path):
    """COIN's subsets are called training and testing."""
    train, test = (
        {"class": "Boil", "subset": "training"},
        {"class": "Cut", "subset": "testing"},
    )
    (tmp_path / "COIN.json").write_text(
        json.dumps({"database": {"abc": train, "-d": test}})
    )
    rows = probe.read_labels(str(tmp_path / "COIN.json"), None)
    assert rows == [("abc", "Boil", "train"), ("-d", "Cut", "test")]


def test_match(capsys):
    """Paths, names and stems find their video; what is left on either side is counted and named."""
    videos = [
        "a/one.x.mp4",
        "a/two.mp4",
        "b/two.mp4",
        "three.mp4",
        "c/four.mp4",
        "c/three.mp4",
    ]
    rows = [
        (name, "L", "")
        for name in ("one.x", "a/two", "three.mp4", "c/four.mp4", "gone")
    ]
    assert sorted(probe.match(rows, videos, "csv")) == [0, 1, 3, 4]
    printed = capsys.readouterr().out
    assert "2 videos have no label: b/two.mp4, c/three.mp4\n" in printed
    assert "1 labels have no video: gone\n" in printed
    with pytest.raises(SystemExit, match="two.mp4 and b/two.mp4"):
        probe.match([("two", "L", "")], videos, "csv")
    with pytest.raises(SystemExit, match="labelled once"):
        probe.match([("one.x", "L", ""), ("one.x.mp4", "M", "")], videos, "csv")


# ---- Splits -------------------------------------------------------------------------------------


def test_split_is_stratified_and_disjoint():
    """No video is in two splits, classes are cut 60/20/20, and the seed decides who goes where."""
    found = {i: ("ab"[i % 2], "") for i in range(40)}
    first, again, other = (
        probe.make_split(found, {""}, s, True, "x") for s in (0, 0, 1)
    )
    assert sorted(sum(first.values(), [])) == list(range(40))
    for part, n in {"train": 12, "val": 4, "test": 4}.items():
        assert [sum(i % 2 == k for i in first[part]) for k in (0, 1)] == [n, n]
    assert first == again and first != other


def test_named_split_is_kept():
    """Published test videos stay the test; validation comes from train if there is none."""
    found = {i: ("ab"[i % 2], "test" if i < 10 else "train") for i in range(40)}
    split = probe.make_split(found, {"train", "test"}, 0, True, "x")
    assert sorted(split["test"]) == list(range(10))
    assert len(split["val"]) == 6 and sorted(split["train"] + split["val"]) == list(
        range(10, 40)
    )
    found = {i: ("ab"[i % 2], ("train", "val", "test")[i % 3]) for i in range(30)}
    split = probe.make_split(found, {"train", "val", "test"}, 0, True, "x")
    assert all(found[i][1] == part for part in split for i in split[part])


@pytest.mark.parametrize("labels, parts, message", [
    ("aaa", ["train", "val", "test"], "1 classes"),
    ("aaaaaaaaab", [""], "'b'"),
    ("abc" * 10, ["train", "train", "test"], "'c'"),
    ("aabb" * 9, ["train", "val"], "'test': 0"),
    ("", [""], "'train': 0"),
])  # fmt: skip
def test_split_errors(labels, parts, message):
    """One class, a lonely video, a class that train lacks and an empty split are named."""
    found = {i: (label, parts[i % len(parts)]) for i, label in enumerate(labels)}
    with pytest.raises(SystemExit, match=message):
        probe.make_split(found, {*parts, "test"} - {""}, 0, True, "labels.csv")


# ---- Features and heads -------------------------------------------------------------------------


@pytest.mark.parametrize("is_raw", [True, False])
def test_features_are_those_of_each_video_alone(tmp_path, is_raw):
    """Batches sorted by length mix up no rows, and a video beyond max_segments is whole."""
    lengths = [3, 1, 20, 3, 7]
    data = load_data(write_npz(tmp_path / "out.npz", [*"abcde"], lengths=lengths))
    model = (
        None if is_raw else load_checkpoint(write_checkpoint(tmp_path / "c"), data, CPU)
    )
    features = probe.compute_features(data, model, CPU).embeddings.split(
        [n + 1 for n in lengths]
    )
    for x, video in zip(features, data.embeddings.float().split(lengths), strict=True):
        with torch.no_grad():
            alone = [torch.zeros(1, 16), video] if is_raw else model.encode(
                video[None], torch.tensor([len(video)]))[0].split([1, len(video)])  # fmt: skip
        assert torch.allclose(x.float(), torch.cat(list(alone)), atol=3e-3)


@pytest.mark.parametrize(
    "Head", [probe.Linear, probe.Attentive, probe.Transformer, probe.Mamba]
)
def test_heads_ignore_padding(Head):
    """Padding and neighbours change nothing; every segment, the last one too, counts."""
    torch.manual_seed(0)
    head = Head(16, 3).eval()
    torch.nn.init.normal_(head.last[1].weight)
    x, lengths = torch.randn(2, 9, 16), torch.tensor([8, 5])
    x[1, 6:] = 0
    together, alone = head(x, lengths)[1], head(x[1:, :6], lengths[1:])[0]
    assert torch.allclose(together, alone, atol=1e-5)
    for row in range(1, 6):
        changed = x[1:, :6].clone()
        changed[0, row] *= -1
        assert not torch.allclose(head(changed, lengths[1:])[0], alone, atol=1e-4), row


def test_order_is_seen_by_the_end_to_end_heads_only():
    """Raw linear and attentive are bags of segments; transformer and mamba are not."""
    torch.manual_seed(0)
    x, lengths = torch.randn(1, 9, 16), torch.tensor([8])
    back = torch.cat([x[:, :1], x[:, 1:].flip(1)], dim=1)
    for Head in (probe.Linear, probe.Attentive, probe.Transformer, probe.Mamba):
        head = Head(16, 3).eval()
        torch.nn.init.normal_(head.last[1].weight)
        same = torch.allclose(head(x, lengths), head(back, lengths), atol=1e-4)
        assert same == (Head in (probe.Linear, probe.Attentive)), Head


def test_attentive_is_a_whole_transformer_layer():
    """Computing [CLS] only gives what PyTorch's full pre-norm layer gives at [CLS]."""
    torch.manual_seed(0)
    head = probe.Attentive(16, 3).eval()
    layer = torch.nn.TransformerEncoderLayer(
        16, 8, 64, 0.0, "gelu", batch_first=True, norm_first=True)  # fmt: skip
    for name in ("norm1", "norm2"):
        getattr(layer, name).load_state_dict(getattr(head, name).state_dict())
    layer.self_attn.load_state_dict(head.attention.state_dict())
    layer.linear1.load_state_dict(head.mlp[0].state_dict())
    layer.linear2.load_state_dict(head.mlp[2].state_dict())
    x, lengths = torch.randn(2, 7, 16), torch.tensor([6, 3])
    is_padding = torch.arange(7) > lengths[:, None]
    assert torch.allclose(head.summary(x, lengths), layer(x, src_key_padding_mask=is_padding)[:, 0],
                          atol=1e-5)  # fmt: skip


def test_selective_scan_is_the_recurrence():
    """The matrix product equals the state carried from step to step."""
    torch.manual_seed(0)
    B, N, H, P, K = 2, 7, 3, 4, 5
    x, b, c = torch.randn(B, N, H, P), torch.randn(B, N, K), torch.randn(B, N, K)
    delta, rate = torch.rand(B, N, H) * 3, torch.rand(H) * 9
    y = probe.selective_scan(x, delta, rate, b, c)
    for i in range(B):
        for h in range(H):
            state = torch.zeros(K, P)
            for t in range(N):
                decay = math.exp(-rate[h] * delta[i, t, h])
                state = decay * state + delta[i, t, h] * torch.outer(
                    b[i, t], x[i, t, h]
                )
                assert torch.allclose(y[i, t, h], c[i, t] @ state, atol=1e-4)


# ---- Training and the command line --------------------------------------------------------------


def test_test_labels_reach_nothing_but_the_score(tmp_path):
    """Neither training nor the choice of the epoch looks at test: swapped labels swap the score."""
    data = load_data(write_npz(tmp_path / "out.npz", [f"{i}.mp4" for i in range(60)]))
    split = {"train": range(30), "val": range(30, 45), "test": range(45, 60)}
    split = {part: list(indices) for part, indices in split.items()}
    args, features = (
        probe.get_args(["--epochs", "5"]),
        probe.compute_features(data, None, CPU),
    )
    targets = torch.arange(60) % 2
    swapped = torch.where(torch.arange(60) < 45, targets, 1 - targets)
    for row in ("raw linear", "raw attentive"):
        one = probe.fit(row, features, targets, split, 0, args, CPU)
        two = probe.fit(row, features, swapped, split, 0, args, CPU)
        assert one + two == pytest.approx(100) and one != two


def test_regression_is_scored_in_its_own_unit(tmp_path):
    """A target far from zero is learned, and the error is not that of the normalised target."""
    videos = [f"{i}.mp4" for i in range(120)]
    data = load_data(write_npz(tmp_path / "out.npz", videos, lengths=[1] * 120))
    targets = 1000 + 50 * data.embeddings[:, 0].float()
    split = {
        "train": list(range(80)),
        "val": list(range(80, 100)),
        "test": list(range(100, 120)),
    }
    args, features = (
        probe.get_args(["--lr", "0.01"]),
        probe.compute_features(data, None, CPU),
    )
    mean, linear = (probe.fit(row, features, targets, split, 0, args, CPU)
                    for row in ("majority", "raw linear"))  # fmt: skip
    error = (targets[100:] - targets[:80].mean()).square().mean().item()
    assert mean == pytest.approx(error, rel=1e-3) and linear < mean / 5


def test_compare(tmp_path, monkeypatch, capsys):
    """The real command: every row with n, the same in the file, and the same when run again."""
    names = [f"{'abc'[i % 3]}/{i}.mp4" for i in range(45)]
    write_npz(tmp_path / "out.npz", names, labels=[name[0] for name in names])
    write_checkpoint(tmp_path / "lvmae.pt")
    flags = [
        "--compare",
        "--runs",
        "2",
        "--epochs",
        "4",
        "--lr",
        "0.01",
        "--json",
        "t.json",
    ]
    command = [sys.executable, probe.__file__, *flags, "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines, table = (
        result.stdout.splitlines(),
        json.loads((tmp_path / "t.json").read_text()),
    )
    assert (
        lines[0] == "2 runs; train 27, val 9, test 9 videos; 3 classes; accuracy in %"
    )
    assert list(table["rows"]) == list(probe.ROWS)
    for line, (row, score) in zip(lines[1:], table["rows"].items(), strict=True):
        assert line.split() == [
            *row.split(),
            f"{score['mean']:.2f}",
            "+-",
            f"{score['std']:.2f}",
        ]
        assert len(score["runs"]) == 2
    assert table["n"] == {"train": 27, "val": 9, "test": 9} and table["classes"] == 3
    assert table["rows"]["majority"]["mean"] == pytest.approx(100 / 3)
    assert table["rows"]["raw linear"]["mean"] > 80
    monkeypatch.chdir(tmp_path)
    probe.main(probe.get_args([*flags, "--device", "cpu"]))
    assert capsys.readouterr().out == result.stdout


def test_baseline_stands_beside_the_result(tmp_path, monkeypatch, capsys):
    """The result comes last, after majority and the raw features with the same head."""
    monkeypatch.chdir(tmp_path)
    names = [f"{'ab'[i % 2]}/{i}.mp4" for i in range(30)]
    write_npz("out.npz", names, labels=[name[0] for name in names])
    write_checkpoint("lvmae.pt")
    for head, rows in {
        "linear": ["raw linear", "LV-MAE linear"],
        "mamba": ["mamba"],
    }.items():
        flags = ["--head", head, "--runs", "1", "--epochs", "1", "--device", "cpu"]
        probe.main(probe.get_args(flags))
        printed = capsys.readouterr().out.splitlines()[1:]
        assert [line[:16].strip() for line in printed] == ["majority", *rows]


def test_errors(tmp_path, monkeypatch):
    """Wrong files and flags end in one line that names them."""
    monkeypatch.chdir(tmp_path)
    write_npz("out.npz", [f"{i}.mp4" for i in range(20)])
    assert "nowhere.csv" in error_of("--labels", "nowhere.csv")
    assert "'train': 0" in error_of()  # no folders, so no labels
    Path("a.csv").write_text("clip,score\n1.mp4,3\n")
    assert "expected video" in error_of("--labels", "a.csv")
    Path("b.csv").write_text("video,label,split\n1.mp4,x,dev\n")
    assert "train|val|test" in error_of("--labels", "b.csv")
    Path("c.csv").write_text(
        "video,label\n" + "".join(f"{i},{'xy'[i % 2]}\n" for i in range(20))
    )
    assert "could not convert" in error_of("--labels", "c.csv", "--regression")
    assert "lvmae.pt" in error_of("--labels", "c.csv")
    Path("d.json").write_text("[1]")
    assert "d.json" in error_of("--labels", "d.json")
    Path("e.json").write_text(
        '{"database": {"1": {"class": "x", "subset": "validation"}}}'
    )
    assert "train|val|test" in error_of("--labels", "e.json")
    assert "--batch-size" in error_of("--batch-size", 1)
