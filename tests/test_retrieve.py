"""Tests of retrieve.py: the database, the search, the masks, and what is printed and drawn."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import extract
import model
import retrieve

WORDS = [f"a {c} {s} {p}" for c in ("red", "blue") for s in ("star", "ring", "дом") for p in
         ("on the beach", "at sea", "in the forest")]  # fmt: skip
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make a folder with a tiny text tower, videos whose segments equal their captions, a model."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    os.mkdir(folder / "clip")
    torch.save(
        open_clip.CLIP(**CLIP).state_dict(), folder / "clip/open_clip_pytorch_model.bin"
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = json.dumps({"model_cfg": CLIP, "preprocess_cfg": preprocess})
    (folder / "clip/open_clip_config.json").write_text(config)

    clip, name = extract.load_encoder(str(folder / "clip"), "", torch.device("cpu"))
    with torch.no_grad():
        embeddings = F.normalize(
            clip.encode_text(open_clip.get_tokenizer(name)(WORDS)), dim=1
        )
    lengths = [3, 20, 1, 9, 17, 2]
    shown = torch.randint(len(WORDS), (sum(lengths),))
    videos = [f"{'ab'[v % 2]}/v{v}.avi" for v in range(len(lengths))]
    starts = np.concatenate([np.arange(n) * 2.5 for n in lengths]).astype(np.float32)
    meta = {"model": str(folder / "clip"), "pretrained": "", "segment_seconds": 2.5}
    np.savez(
        folder / "out.npz",
        embeddings=embeddings[shown].half().numpy(),
        lengths=np.array(lengths),
        starts=starts,
        videos=np.array(videos),
        meta=json.dumps(meta),
    )
    names = np.repeat(videos, lengths)
    rows = [
        f"{v},{s},{WORDS[w]}\n" for v, s, w in zip(names, starts, shown, strict=True)
    ]
    (folder / "captions.csv").write_text(
        "video,start,caption\n" + "".join(rows), "utf-8"
    )
    (folder / "captions.txt").write_text("\n".join(WORDS), "utf-8")
    np.savez(folder / "captions.npz", captions=WORDS, embeddings=embeddings.numpy())
    network = model.LVMAE(model.LVMAEConfig(32, 1, 2, 16, 1, 2))
    checkpoint = {"config": asdict(network.config), "model": network.state_dict()}
    torch.save(checkpoint, folder / "lvmae.pt")
    return folder


def run(world, capsys, *argv):
    """Run retrieve.py in this process; return the scores and what it prints."""
    files = [f"--data={world / 'out.npz'}", f"--ckpt={world / 'lvmae.pt'}"]
    files += [f"--captions={world / 'captions.npz'}", f"--json={world / 'scores.json'}"]
    retrieve.main(retrieve.get_args([*files, "--device=cpu", *map(str, argv)]))
    return json.loads((world / "scores.json").read_text()), capsys.readouterr().out


def test_search_equals_sorting_all_similarities():
    """Catches block borders that shift caption numbers, lose a top caption or miscount a rank."""
    torch.manual_seed(0)
    queries, captions = torch.randn(1100, 8), F.normalize(torch.randn(5000, 8), dim=1)
    truth = torch.randint(5000, (1100,))
    similarity = F.normalize(queries.double(), dim=1) @ captions.double().T
    order = similarity.argsort(dim=1, descending=True)
    values, numbers, rank = retrieve.search(queries, captions, truth, 3, "cpu")
    assert torch.equal(numbers, order[:, :3])
    assert torch.allclose(
        values.double(), similarity.gather(1, order[:, :3]), atol=1e-6
    )
    for step, compare in (
        (0, torch.le),
        (2e-6, torch.ge),
    ):  # nearer than this may be a tie
        higher = (similarity > similarity.gather(1, truth[:, None]) + step).sum(1)
        assert compare(rank, 1 + higher).all()


def test_rounding_does_not_rank_a_caption_above_itself():
    """Catches ranks of 2 where the query is the caption: two matrix shapes round differently."""
    torch.manual_seed(0)
    captions = F.normalize(torch.randn(5000, 1024), dim=1)
    rank = retrieve.search(7 * captions[:2000], captions, torch.arange(2000), 1, "cpu")[
        2
    ]
    assert (rank == 1).all()


def test_fewer_captions_than_asked_for():
    """Catches a crash where --top-k exceeds the database, or its last block of captions."""
    for number in (2, 2049):
        captions = F.normalize(torch.randn(number, 4), dim=1)
        _, numbers, _ = retrieve.search(
            torch.randn(3, 4), captions, torch.zeros(3).long(), 5, "cpu"
        )
        assert [len(set(row)) for row in numbers.tolist()] == [min(5, number)] * 3


def test_captions_count_once(world, tmp_path):
    """Catches repeats, blank lines, a byte-order mark or line ends that make new captions."""
    data = model.load_data(world / "out.npz")
    path = str(tmp_path / "captions.txt")
    Path(path).write_bytes(
        "\ufeffb  b\r\na\r\n\r\nb b\r\nа\r\n".encode()
    )  # the last is Cyrillic
    captions, embeddings, truth = retrieve.read_captions(path, data)
    assert captions == ["b b", "a", "а"] and embeddings is None and (truth == -1).all()
    vectors = torch.randn(4, 32)
    path = str(tmp_path / "captions.npz")
    np.savez(path, captions=["b b", "a", " b b", "c"], embeddings=vectors.numpy())
    captions, embeddings, _ = retrieve.read_captions(path, data)
    assert captions == ["b b", "a", "c"]
    assert torch.allclose(embeddings, F.normalize(vectors[[2, 1, 3]], dim=1))


def test_csv_finds_its_segments(world, tmp_path):
    """Catches captions put to the wrong segment: order, notation of starts, quotes."""
    data = model.load_data(world / "out.npz")
    path = str(tmp_path / "captions.csv")
    rows = 'b/v1.avi,2.50,"one, two"\nelsewhere.avi,0,three\na/v0.avi,5,four\na/v2.avi,0,\n'
    Path(path).write_text("video,start,caption\n" + rows)
    captions, _, truth = retrieve.read_captions(path, data)
    assert captions == ["one, two", "three", "four"]
    assert {row: captions[n] for row, n in enumerate(truth) if n >= 0} == {
        2: "four",
        4: "one, two",
    }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "No such file"),
        ("x.csv", "video,caption\nb/v1.avi,a dog\n", "'start'"),
        ("x.csv", "video,start,caption\nb/v1.avi,soon,a dog\n", "soon"),
        ("x.csv", "video,start,caption\nv1.avi,0,a dog\n", "a/v0.avi"),
        ("x.txt", "\n \n", "no caption"),
        ("x.txt", b"\xff\xfe\x00", "utf-8"),
        ("x.npz", "text", "captions, embeddings (.npz)"),
        ("x.npz", {"captions": ["a"]}, "embeddings"),
        ("x.npz", {"captions": ["a"], "embeddings": np.ones((1, 5))}, "(1, 32)"),
        (
            "x.npz",
            {"captions": ["a"], "embeddings": np.full((1, 32), np.nan)},
            "finite",
        ),
        (
            "x.npz",
            {"captions": np.array([["a"]], object), "embeddings": np.ones((1, 32))},
            "pickle",
        ),
    ],
)
def test_bad_captions_are_one_line(world, tmp_path, name, content, words):
    """Catches a traceback, or an error that does not name the file and what was expected."""
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as error:
        retrieve.read_captions(str(path), model.load_data(world / "out.npz"))
    text = str(error.value)
    assert name in text and words in text and "expected" in text and "\n" not in text


def test_cache_follows_captions_and_weights(world, tmp_path, monkeypatch):
    """Catches text embeddings of other captions or of another model, read from the cache."""
    data, path = model.load_data(world / "out.npz"), str(tmp_path / "captions.txt")
    loads = []
    load = retrieve.load_encoder
    monkeypatch.setattr(
        retrieve, "load_encoder", lambda *args: loads.append(1) or load(*args)
    )

    def embed(captions):
        return retrieve.embed_captions(path, captions, data, torch.device("cpu"))

    first = embed(WORDS)
    assert torch.equal(embed(WORDS), first) and len(loads) == 1
    assert torch.allclose(embed(WORDS[2:5]), first[2:5], atol=1e-3) and len(loads) == 2
    embed(WORDS)
    os.utime(world / "clip/open_clip_pytorch_model.bin", (1, 1))
    embed(WORDS)
    assert len(loads) == 4
    assert sorted(os.listdir(tmp_path)) == ["captions.txt.cache.npz"]


@pytest.mark.parametrize(
    "meta", [{}, {"model": "LanguageBind"}, {"model": "gone/clip"}, "RN50"]
)
def test_no_text_tower_points_to_npz(world, tmp_path, monkeypatch, meta):
    """Catches a dead end for embeddings that open_clip cannot embed captions for."""
    data = model.load_data(world / "out.npz")
    if meta == "RN50":  # its text embeddings have another size than the data
        encoder = retrieve.load_encoder(data.meta["model"], "", torch.device("cpu"))
        monkeypatch.setattr(retrieve, "load_encoder", lambda *args: encoder)
        data = data._replace(embeddings=torch.ones(len(data.starts), 8))
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        data = data._replace(meta=meta)
    with pytest.raises(SystemExit) as error:
        retrieve.embed_captions(
            str(tmp_path / "c.txt"), WORDS, data, torch.device("cpu")
        )
    assert "--captions FILE.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mask", ["random", "semantic"])
def test_reconstructions_stand_at_their_segments(world, mask):
    """Catches predictions written to the rows of other segments or of other videos."""
    data = model.load_data(world / "out.npz")
    network = model.load_checkpoint(world / "lvmae.pt", data, torch.device("cpu"))
    args = retrieve.get_args(["--mask", mask, "--mask-ratio", "0.3"])
    is_masked, rebuilt = retrieve.reconstruct(network, data, args, torch.device("cpu"))
    for first, n in zip(data.first, data.lengths, strict=True):
        rows = slice(first, first + n)
        hidden = is_masked[rows]
        assert hidden.sum() == (max(1, round(0.3 * n.item())) if n > 1 else 0)
        if n > 1:
            alone = data.embeddings[None, rows].float()
            with torch.no_grad():
                predictions = network(alone, n[None], hidden[None])[1][0]
            close = torch.allclose(
                rebuilt["reconstructed"][rows][hidden].float(),
                predictions[hidden],
                atol=1e-3,
            )
            assert close
            mean = alone[0][~hidden].mean(0).expand(int(hidden.sum()), -1)
            assert torch.allclose(
                rebuilt["visible mean"][rows][hidden].float(), mean, atol=1e-3
            )
    if mask == "semantic":
        assert not is_masked[data.first[data.lengths > 2]].any()


def test_scores_of_a_perfect_and_of_no_model(world, capsys, monkeypatch):
    """Catches scores over the wrong segments: a model that cheats must get 100 %, as the truth."""
    scores, _ = run(world, capsys, f"--captions={world / 'captions.csv'}")
    assert scores["true"] == {"R@1": 100, "R@5": 100, "R@10": 100, "median rank": 1}
    assert scores["reconstructed"]["R@1"] < 60
    assert (
        scores["n"] == 1 + 8 + 4 + 7 + 1
        and scores["captions"] == scores["chance"]["median rank"] * 2 - 1
    )
    assert scores["chance"]["R@5"] == pytest.approx(500 / scores["captions"])
    monkeypatch.setattr(
        retrieve.lvmae, "load_checkpoint", lambda *args: lambda x, *_: (None, x)
    )
    perfect, text = run(
        world, capsys, f"--captions={world / 'captions.csv'}", "--video", "b/v3.avi"
    )
    assert perfect["reconstructed"] == perfect["true"] and perfect["n"] == scores["n"]
    lines = [line for line in text.splitlines() if "▒" in line][1:]
    assert (
        len(lines) == 4
    )  # round(0.4 * 9) masked segments: true caption, same, the caption again
    for line in lines:
        _, _, caption, true, again = [cell for cell in line.split("  ") if cell]
        assert true.split()[1] == "same" and again.strip()[5:] == caption.strip()


def test_a_reconstruction_is_read_itself(world, capsys, monkeypatch):
    """Catches a table whose last column reads the true embedding, or another segment's."""
    target = torch.from_numpy(np.load(world / "captions.npz")["embeddings"])[5]
    network = lambda x, *_: (None, target.expand_as(x))  # noqa: E731
    monkeypatch.setattr(retrieve.lvmae, "load_checkpoint", lambda *args: network)
    lines = run(world, capsys)[1].splitlines()
    lines = [line for line in lines[1:] if "▒" in line]
    assert lines and all(line.endswith(f"1.00 {WORDS[5]}") for line in lines)


def test_unknown_captions_do_not_count(world, tmp_path, capsys):
    """Catches scores over masked segments whose true caption the CSV does not have."""
    scores, _ = run(world, capsys, f"--captions={world / 'captions.csv'}")
    rows = (world / "captions.csv").read_text("utf-8").splitlines()
    path = tmp_path / "captions.csv"
    path.write_text("\n".join(row for row in rows if "v1.avi" not in row), "utf-8")
    partial, text = run(world, capsys, f"--captions={path}")
    assert partial["n"] == scores["n"] - 8 and partial["true"]["R@1"] == 100
    path.write_text(
        "\n".join([rows[0], *(row for row in rows if "v2.avi" in row)]), "utf-8"
    )
    with pytest.raises(
        SystemExit, match="no masked segment to score"
    ):  # v2 has one segment
        run(world, capsys, f"--captions={path}")


def test_without_true_captions_it_counts_agreement(world, capsys):
    """Catches a reference other than the caption that the true embedding retrieves."""
    known, _ = run(world, capsys, f"--captions={world / 'captions.csv'}")
    agreement, text = run(world, capsys, f"--captions={world / 'captions.txt'}")
    assert "caption that the true embedding retrieves" in text and "same" not in text
    if (
        known["captions"] == agreement["captions"]
    ):  # here the embedding retrieves the true caption
        assert agreement == known


def test_unknown_video_lists_the_nearest(world, capsys):
    """Catches a KeyError for a mistyped name."""
    with pytest.raises(SystemExit, match="nearest are b/v3.avi"):
        run(world, capsys, "--video", "b/v3.mp4")


def test_default_is_the_longest_video_and_several_can_be_shown(world, capsys):
    """Catches the first video for the longest, and names after the first ignored."""
    assert run(world, capsys)[1].startswith("b/v1.avi")
    text = run(world, capsys, "--video", "a/v2.avi", "b/v3.avi", "--show", 2)[1]
    assert text.index("a/v2.avi") < text.index("b/v3.avi")
    assert (
        text.count("0:00") == 1 and text.count("0:07") == text.count("0:10") == 1
    )  # the middle


def test_table_wraps_and_keeps_every_word(capsys):
    """Catches lines wider than the README, and captions that are cut."""
    words = " ".join(f"word{i}" for i in range(30))
    rows = [
        ("0:00", "▒", words, f"0.93 {words}\n0.91 {words}", f"0.90 {words}"),
        ("59:55", "", "", "", ""),
    ]
    retrieve.print_table(rows)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert all(
        text.count(f"word{i} ") + text.count(f"word{i}\n") == 4 for i in range(30)
    )


def test_figure_shows_frames_and_marks_the_masked(world, tmp_path, capsys):
    """Catches frames of other segments, a red border at the wrong one, and a missing folder."""
    import cv2

    os.mkdir(tmp_path / "b")
    video = cv2.VideoWriter(
        str(tmp_path / "b/v3.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 4, (96, 64)
    )
    # 2.5 s are 10 frames; segment i is a grey of 20 * i, but starts with a white frame
    for frame in range(9 * 10):
        video.write(
            np.full((64, 96, 3), 20 * (frame // 10) if frame % 10 else 255, np.uint8)
        )
    video.release()
    figure = tmp_path / "figure.png"
    argv = ["--video", "b/v3.avi", "--show", "8", "--figure", figure]
    with pytest.raises(SystemExit, match="--videos"):
        run(world, capsys, *argv)
    _, text = run(world, capsys, *argv, "--videos", tmp_path)
    pixels = np.asarray(Image.open(figure).convert("RGB")).astype(int)
    assert pixels.shape[1] == 1000
    height = (len(pixels) - 40) // 2
    is_red = []
    for i in range(8):  # an odd video has its middle at segment 0 of 9: (9 - 8) // 2
        x, bottom = 8 + i % 4 * 248, 40 + (i // 4 + 1) * height - 18
        assert abs(pixels[bottom - 50, x + 120] - 20 * i).max() < 8
        is_red.append(
            pixels[bottom - 50, x + 2, 0] - pixels[bottom - 50, x + 2, 1] > 100
        )
    lines = [line for line in text.splitlines() if line[:1].isdigit()][:8]
    assert is_red == ["▒" in line for line in lines] and any(is_red) and not all(is_red)


def test_command_line(world):
    """Catches a script that works only when imported: the real command, in ASCII."""
    argv = [
        "--captions",
        "captions.csv",
        "--top-k",
        "2",
        "--mask",
        "semantic",
        "--device",
        "cpu",
    ]
    script = Path(retrieve.__file__)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, script, *argv], cwd=world, env=environment,
                            capture_output=True, text=True, timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "true caption" in result.stdout and result.stdout.splitlines()[
        -1
    ].startswith("chance")
