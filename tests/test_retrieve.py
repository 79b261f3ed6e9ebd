"""Tests of retrieve.py: the ranks, the masks, the captions, and what is printed and drawn."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import extract
import model
import retrieve

CPU = torch.device("cpu")
WORDS = []
for thing in ("red star", "blue star", "red ring", "blue ring", "red дом", "blue дом"):
    for place in ("on the beach", "at sea", "in the forest"):
        WORDS.append(f"a {thing} {place}")
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}
LENGTHS = [3, 20, 1, 9, 17, 2]
VIDEOS = ["a/v0.avi", "b/v1.avi", "a/v2.avi", "b/v3.avi", "a/v4.avi", "b/v5.avi"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make a tiny text tower, videos whose segments equal their captions, a model."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    os.mkdir(folder / "clip")
    weights = open_clip.CLIP(**CLIP).state_dict()
    torch.save(weights, folder / "clip/open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": CLIP, "preprocess_cfg": preprocess}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(config))

    name = str(folder / "clip")
    clip, _ = extract.load_encoder(name, "", CPU)
    tokenize = open_clip.get_tokenizer(extract.encoder_name(name))
    with torch.no_grad():
        embeddings = F.normalize(clip.encode_text(tokenize(WORDS)), dim=1)
    shown = torch.randint(len(WORDS), (sum(LENGTHS),))
    starts = np.concatenate([np.arange(n) * 2.5 for n in LENGTHS]).astype(np.float32)
    meta = {"model": name, "pretrained": "", "segment_seconds": 2.5}
    np.savez(
        folder / "out.npz",
        embeddings=embeddings[shown].half().numpy(),
        lengths=np.array(LENGTHS),
        starts=starts,
        videos=np.array(VIDEOS),
        meta=json.dumps(meta),
    )

    rows = ["video,start,caption\n"]
    names = np.repeat(VIDEOS, LENGTHS)
    for video, start, w in zip(names, starts, shown, strict=True):
        rows.append(f"{video},{start},{WORDS[w]}\n")
    (folder / "captions.csv").write_text("".join(rows), "utf-8")
    (folder / "captions.txt").write_text("\n".join(WORDS), "utf-8")
    np.savez(
        folder / "captions.npz",
        captions=WORDS,
        embeddings=embeddings.numpy(),
        meta=json.dumps(meta),
    )
    network = model.LVMAE(model.LVMAEConfig(32, 1, 2, 16, 1, 2))
    checkpoint = {
        "config": asdict(network.config),
        "model": network.state_dict(),
        "args": {"mask": "random", "mask_ratio": 0.4},
        "videos": [],
        "encoder": meta,
    }
    torch.save(checkpoint, folder / "lvmae.pt")
    return folder


def run(world, capsys, *argv):
    """Run retrieve.py in this process; return the scores and what it prints."""
    files = [f"--data={world / 'out.npz'}", f"--ckpt={world / 'lvmae.pt'}"]
    files += [f"--captions={world / 'captions.npz'}", f"--json={world / 'scores.json'}"]
    retrieve.main(retrieve.get_args([*files, "--device=cpu", *map(str, argv)]))
    return json.loads((world / "scores.json").read_text()), capsys.readouterr().out


def error_of(function, *args):
    """Call what must stop with one line; return the line."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    line = str(error.value)
    assert line and "\n" not in line
    return line


def use_network(monkeypatch, network, **checkpoint):
    """Let retrieve.py read `network` in place of the checkpoint."""
    found = {"args": {"mask": "random", "mask_ratio": 0.4}, "videos": []} | checkpoint
    load = lambda *args: (network, found)  # noqa: E731
    monkeypatch.setattr(retrieve, "load_checkpoint", load)


def change_checkpoint(world, tmp_path, **changes):
    """Write the world's checkpoint with changes; None removes -> path."""
    checkpoint = torch.load(world / "lvmae.pt", weights_only=True) | changes
    for key, value in changes.items():
        if value is None:
            del checkpoint[key]
    torch.save(checkpoint, tmp_path / "other.pt")
    return tmp_path / "other.pt"


# ---- Eq. (4) and ranks -----------------------------------------------------------------


def test_search_and_rank_equal_sorting_all_similarities():
    """Catches a wrong order or rank."""
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(110, 8), dim=1)
    captions = F.normalize(torch.randn(500, 8), dim=1)
    answers = torch.randint(500, (110,))
    similarity = queries.double() @ captions.double().T
    order = similarity.argsort(dim=1, descending=True)

    values, numbers = retrieve.search(queries, captions, 3)
    assert torch.equal(numbers, order[:, :3])
    expected = similarity.gather(1, order[:, :3])
    assert torch.allclose(values.double(), expected, atol=1e-6)

    limit = similarity.gather(1, answers[:, None])
    low = 1 + (similarity > limit + 2e-6).sum(1)  # nearer than this may be a tie
    high = (similarity >= limit - 2e-6).sum(1)
    rank = retrieve.rank_captions(queries, captions, answers)
    assert rank.shape == (110,) and (low <= rank).all() and (rank <= high).all()


@pytest.mark.parametrize("captions", ["captions.csv", "captions.txt"])
def test_ranks_do_not_depend_on_blocks(world, capsys, monkeypatch, captions):
    """Catches borders of blocks that shift queries, and memory for all of them at once."""
    expected, _ = run(world, capsys, f"--captions={world / captions}")
    assert expected["n"] == 21
    sizes = []

    def compare(queries, captions, compare=retrieve.compare):
        sizes.append(len(queries))
        return compare(queries, captions)

    monkeypatch.setattr(retrieve, "compare", compare)
    for block in (1, 4, 21):
        monkeypatch.setattr(retrieve, "BLOCK", block)
        sizes.clear()
        found, _ = run(world, capsys, f"--captions={world / captions}")
        assert found == expected and max(sizes) == block


def test_rounding_does_not_rank_a_caption_above_itself():
    """Catches ranks of 2 where the query is the caption: similarities round."""
    torch.manual_seed(0)
    captions = F.normalize(torch.randn(5000, 1024), dim=1)
    rank = retrieve.rank_captions(captions[:2000], captions, torch.arange(2000))
    assert (rank == 1).all()


def test_equal_captions_do_not_flatter():
    """Catches recalls of 100 % from caption embeddings that are all the same."""
    captions = torch.ones(50, 4) / 2
    rank = retrieve.rank_captions(captions[:3], captions, torch.arange(3))
    assert rank.tolist() == [50, 50, 50]


def test_fewer_captions_than_asked_for():
    """Catches a crash where --top-k exceeds the number of captions."""
    captions = F.normalize(torch.randn(2, 4), dim=1)
    _, numbers = retrieve.search(captions, captions, 5)
    assert numbers.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("value", [0, np.nan, np.inf, 1e30])
def test_captions_without_direction_are_refused(world, tmp_path, value):
    """Catches ranks of 1 from embeddings of zero, NaN or 1e30: no comparison is True."""
    with np.load(world / "captions.npz") as file:
        embeddings = file["embeddings"]
    embeddings[3] = value
    path = str(tmp_path / "c.npz")
    np.savez(path, captions=WORDS, embeddings=embeddings)
    data = model.load_data(world / "out.npz")
    assert "c.npz" in error_of(retrieve.read_captions, path, data, CPU)


@pytest.mark.parametrize("value", [0, np.nan, np.inf, 1e30])
def test_reconstructions_without_direction_are_refused(
    world, capsys, monkeypatch, value
):
    """Catches a model whose outputs overflow, and that scores 100 % for it."""
    network = lambda x, *_: (None, torch.full_like(x, value))  # noqa: E731
    use_network(monkeypatch, network)
    line = error_of(run, world, capsys)
    assert "lvmae.pt" in line and "reconstructed" in line


def test_a_model_of_nan_is_refused(world, tmp_path, capsys):
    """Catches scores of a checkpoint whose weights are not finite."""
    weights = torch.load(world / "lvmae.pt", weights_only=True)["model"]
    weights["norm.weight"] = weights["norm.weight"] * torch.nan
    path = change_checkpoint(world, tmp_path, model=weights)
    assert "norm.weight" in error_of(run, world, capsys, f"--ckpt={path}")


# ---- Captions --------------------------------------------------------------------------


def test_captions_count_once(world, tmp_path):
    """Catches repeats, blank lines, a byte-order mark or line ends that make new ones."""
    data = model.load_data(world / "out.npz")
    path = str(tmp_path / "captions.txt")
    text = "\ufeffb  b\r\na\r\n\r\nb b\r\nа\r\n"  # the last letter is Cyrillic
    Path(path).write_bytes(text.encode())
    captions = retrieve.read_captions(path, data, CPU)
    assert captions.texts == ["b b", "a", "а"] and not captions.has_answers

    vectors = torch.randn(4, 32)
    path = str(tmp_path / "captions.npz")
    np.savez(path, captions=["b b", "", "a", " b b"], embeddings=vectors.numpy())
    captions = retrieve.read_captions(path, data, CPU)
    assert captions.texts == ["b b", "a"]
    expected = F.normalize(vectors[[0, 2]], dim=1)
    assert torch.allclose(captions.embeddings, expected)


def test_csv_finds_its_segments(world, tmp_path):
    """Catches captions put to the wrong segment: order, notation of starts, quotes."""
    data = model.load_data(world / "out.npz")
    path = str(tmp_path / "captions.csv")
    text = """video,start,caption
b/v1.avi,2.50,"one, two"
elsewhere.avi,0,three
a/v0.avi,4.98,four
a/v2.avi,0,
"""
    Path(path).write_text(text)
    captions = retrieve.read_captions(path, data, CPU)
    assert captions.texts == ["one, two", "three", "four"]
    assert [len(answers) for answers in captions.answers] == LENGTHS
    assert captions.answers[0].tolist() == [-1, -1, 2]
    assert captions.answers[1].tolist() == [-1, 0] + 18 * [-1]
    assert (torch.cat(captions.answers) >= 0).sum() == 2


def test_npz_with_segments_equals_csv(world, tmp_path, capsys):
    """Catches an .npz whose videos and starts are not used: no true captions."""
    lines = (world / "captions.csv").read_text("utf-8").splitlines()[1:]
    videos, starts, texts = zip(*[line.split(",") for line in lines], strict=True)
    vectors = dict(zip(WORDS, np.load(world / "captions.npz")["embeddings"]))  # noqa: B905
    np.savez(
        tmp_path / "captions.npz",
        captions=texts,
        embeddings=[vectors[text] for text in texts],
        videos=videos,
        starts=np.array(starts, np.float32),
    )
    found, text = run(world, capsys, f"--captions={tmp_path / 'captions.npz'}")
    expected, _ = run(world, capsys, f"--captions={world / 'captions.csv'}")
    assert found == expected and "rank of the true caption" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "No such file"),
        ("x.CSV", "video,start,caption\nb/v1.avi,0,a dog\n", ".csv"),
        ("x.tsv", "video\tstart\tcaption\nb/v1.avi\t0\ta dog\n", ".csv"),
        ("x.json", '["a dog", "a cat"]', ".csv"),
        ("x.csv", "video,caption\nb/v1.avi,a dog\n", "'start'"),
        ("x.csv", "video,start,caption\nb/v1.avi,0,a dog, two\n", "quotes"),
        ("x.csv", "video,start,caption\nb/v1.avi,soon,a dog\n", "soon"),
        ("x.csv", "video,start,caption\nb/v1.avi,nan,a dog\n", "NaN"),
        ("x.csv", "video,start,caption\nv1.avi,0,a dog\n", "a/v0.avi"),
        ("x.csv", "video,start,caption\nb/v1.avi,0,a\nb/v1.avi,0.0,b\n", "twice"),
        ("x.txt", "\n \n", "no caption"),
        ("x.txt", b"\xff\xfe\x00", "utf-8"),
        ("x.npz", "text", ".npz captions, embeddings"),
        ("x.npz", {"captions": ["a"]}, "embeddings"),
        ("x.npz", {"captions": [1.5], "embeddings": np.ones((1, 32))}, "float"),
        ("x.npz", {"captions": ["a"], "embeddings": np.ones((1, 5))}, "(1, 32)"),
        (
            "x.npz",
            {"captions": ["a"], "embeddings": np.ones((1, 32), int)},
            "expected floats",
        ),
        (
            "x.npz",
            {
                "captions": ["a", "b"],
                "embeddings": np.ones((2, 32)),
                "videos": ["a/v0.avi"],
                "starts": [0.0],
            },
            "1 videos",
        ),
        (
            "x.npz",
            {"captions": np.array([["a"]], object), "embeddings": np.ones((1, 32))},
            "pickle",
        ),
    ],
)
def test_bad_captions_are_one_line(world, tmp_path, name, content, words):
    """Catches a traceback, and endings or starts that are read as something else."""
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    data = model.load_data(world / "out.npz")
    line = error_of(retrieve.read_captions, str(path), data, CPU)
    assert name in line and words in line


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        (None, "model unknown"),
        ({"model": "other", "pretrained": ""}, "other"),
        ("same", ""),
    ],
)
def test_captions_of_another_encoder_are_noticed(world, tmp_path, capsys, meta, words):
    """Catches captions of another encoder of the same size, scored without a word."""
    data = model.load_data(world / "out.npz")
    arrays = dict(np.load(world / "captions.npz"))
    if meta is None:
        del arrays["meta"]
    elif meta != "same":
        arrays["meta"] = json.dumps(meta)
    path = str(tmp_path / "c.npz")
    np.savez(path, **arrays)
    retrieve.read_captions(path, data, CPU)
    text = capsys.readouterr().err
    assert words in text and bool(text) == bool(words)


def test_text_embeddings_stand_at_their_captions(world):
    """Catches batches of captions that are lost or come back in another order."""
    data = model.load_data(world / "out.npz")
    texts = [f"{word} {i}" for i in range(20) for word in WORDS]  # 360, in two batches
    found = retrieve.embed_captions(texts, data, CPU)
    assert found.shape == (360, 32)
    for i in (0, 255, 256, 359):
        alone = retrieve.embed_captions([texts[i]], data, CPU)
        assert torch.allclose(found[i], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    "meta", [{}, {"model": "LanguageBind"}, {"model": "gone/clip"}]
)
def test_no_text_tower_points_to_npz(world, monkeypatch, meta):
    """Catches a dead end for embeddings that open_clip cannot embed captions for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = replace(model.load_data(world / "out.npz"), meta=meta)
    line = error_of(retrieve.embed_captions, WORDS, data, CPU)
    assert "out.npz" in line and "--captions FILE.npz" in line


def test_a_text_tower_of_another_size_is_one_line(world):
    """Catches a traceback where `model` in meta is not what made the embeddings."""
    data = model.load_data(world / "out.npz")
    wider = [F.pad(video, (0, 8)) for video in data.embeddings]
    data = replace(data, embeddings=wider)
    path = str(world / "captions.txt")
    line = error_of(retrieve.read_captions, path, data, CPU)
    assert "out.npz" in line and "size 32, expected 40" in line and ".npz" in line


# ---- Masks and videos ------------------------------------------------------------------


@pytest.mark.parametrize("mask", model.MASKS)
def test_reconstructions_stand_at_their_segments(world, mask):
    """Catches masks of a wrong size, and predictions for other masks or segments."""
    data = model.load_data(world / "out.npz")
    network, _ = model.load_checkpoint(world / "lvmae.pt", data, CPU)
    args = retrieve.get_args(["--mask", mask, "--mask-ratio", "0.3"])
    for v, n in enumerate(LENGTHS):
        is_masked, rebuilt = retrieve.reconstruct(network, data, v, args, CPU)
        embeddings, lengths = model.collate([data.embeddings[v]])
        with torch.no_grad():
            _, predictions = network(embeddings, lengths, is_masked[None])
        assert is_masked.sum() == min(n - 1, max(1, round(0.3 * n)))
        assert torch.allclose(rebuilt["true"], embeddings[0], atol=1e-3)
        hidden = F.normalize(predictions[0], dim=1)[is_masked]
        assert torch.allclose(rebuilt["reconstructed"][is_masked], hidden, atol=1e-5)
        mean = F.normalize(embeddings[0][~is_masked].mean(0), dim=0).expand_as(hidden)
        assert torch.allclose(rebuilt["visible mean"][is_masked], mean, atol=1e-5)


def test_masks_do_not_depend_on_what_is_shown(world, capsys):
    """Catches random masks drawn in turn: --video would change the scores."""
    first, _ = run(world, capsys)
    second, _ = run(world, capsys, "--video", "a/v4.avi", "a/v0.avi")
    other, _ = run(world, capsys, "--seed", 1)
    assert first == second and first != other


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "(semantic, 30%)"),
        (["--mask", "random"], "(random, 30%)"),
        (["--mask-ratio", "0.8"], "(semantic, 80%)"),
    ],
)
def test_masks_are_those_of_the_training(world, tmp_path, capsys, argv, words):
    """Catches a model scored with other masks than it was trained on, unasked."""
    masks = {"mask": "semantic", "mask_ratio": 0.3}
    path = change_checkpoint(world, tmp_path, args=masks)
    scores, text = run(world, capsys, f"--ckpt={path}", *argv)
    assert words in text and f"({scores['mask']}, {scores['mask_ratio']:.0%})" == words


def test_unknown_masks_are_asked_for(world, tmp_path, capsys):
    """Catches masks made up for a checkpoint that does not say, or names unknown ones."""
    for args in (None, {"mask": "block", "mask_ratio": 0.4}, {"mask": "random"}):
        path = change_checkpoint(world, tmp_path, args=args)
        assert "--mask-ratio" in error_of(run, world, capsys, f"--ckpt={path}")


def test_only_unseen_videos_are_scored(world, tmp_path, capsys):
    """Catches scores over videos that the model was trained on."""
    path = change_checkpoint(world, tmp_path, videos=["b/v1.avi", "a/v4.avi", "gone"])
    scores, text = run(world, capsys, f"--ckpt={path}")
    assert scores["n"] == 1 + 4 + 1 and scores["videos"] == 3
    assert f"3 of 6 videos, those that {path} was not trained on" in text
    assert text.startswith("b/v3.avi")  # the longest of these
    _, text = run(world, capsys, f"--ckpt={path}", "--video", "b/v1.avi")
    assert text.startswith("b/v1.avi")


@pytest.mark.parametrize("videos", [VIDEOS, [v for v in VIDEOS if "v2" not in v], None])
def test_without_unseen_videos_all_are_scored_and_it_says_so(
    world, tmp_path, capsys, videos
):
    """Catches training videos, or those of an unnamed training, passed off as new."""
    path = change_checkpoint(world, tmp_path, videos=videos)
    scores, text = run(world, capsys, f"--ckpt={path}")
    assert scores["n"] == 21 and "none is known to be new" in text


# ---- Scores ----------------------------------------------------------------------------


def test_scores_of_a_perfect_and_of_no_model(world, capsys, monkeypatch):
    """Catches scores over the wrong segments: a model that cheats must get 100 %."""
    captions = f"--captions={world / 'captions.csv'}"
    scores, _ = run(world, capsys, captions)
    C = scores["captions"]
    assert scores["true"] == {"R@1": 100, "R@5": 100, "R@10": 100, "median rank": 1}
    assert scores["reconstructed"]["R@1"] < 60
    assert scores["n"] == 1 + 8 + 4 + 7 + 1
    assert scores["chance"]["median rank"] == (C + 1) / 2
    assert scores["chance"]["R@5"] == pytest.approx(500 / C)

    use_network(monkeypatch, lambda x, *_: (None, x))
    perfect, text = run(world, capsys, captions, "--video", "b/v3.avi")
    assert perfect["reconstructed"] == perfect["true"] and perfect["n"] == scores["n"]
    lines = [line for line in text.splitlines() if "▒" in line][1:]
    assert len(lines) == 4  # round(0.4 * 9)
    for line in lines:
        _, _, caption, true, again = [cell for cell in line.split("  ") if cell]
        assert true.split()[1] == "same" and again.strip()[5:] == caption.strip()


def test_a_reconstruction_is_read_itself(world, capsys, monkeypatch):
    """Catches a last column that reads the true embedding, or another segment's."""
    target = torch.from_numpy(np.load(world / "captions.npz")["embeddings"])[5]
    use_network(monkeypatch, lambda x, *_: (None, target.expand_as(x)))
    lines = run(world, capsys)[1].splitlines()
    lines = [line for line in lines[1:] if "▒" in line]
    assert lines and all(line.endswith(f"1.00 {WORDS[5]}") for line in lines)


def test_unknown_captions_do_not_count(world, tmp_path, capsys):
    """Catches scores over masked segments whose true caption the CSV does not have."""
    scores, _ = run(world, capsys, f"--captions={world / 'captions.csv'}")
    head, *rows = (world / "captions.csv").read_text("utf-8").splitlines()
    path = tmp_path / "captions.csv"
    without = [row for row in rows if "v1.avi" not in row]
    path.write_text("\n".join([head, *without]), "utf-8")
    partial, _ = run(world, capsys, f"--captions={path}")
    assert partial["n"] == scores["n"] - 8 and partial["true"]["R@1"] == 100
    assert partial["videos"] == scores["videos"] - 1

    single = [row for row in rows if "v2.avi" in row]  # of one segment: nothing masked
    path.write_text("\n".join([head, *single]), "utf-8")
    line = error_of(run, world, capsys, f"--captions={path}")
    assert "no caption of what is masked" in line


def test_captions_of_no_segment_are_counted(world, tmp_path, capsys):
    """Catches captions whose times or names match nothing, and nobody is told."""
    head, *rows = (world / "captions.csv").read_text("utf-8").splitlines()
    path = tmp_path / "captions.csv"
    path.write_text("\n".join([head, *rows, "v1.avi,2.5,a", "v99.avi,0,b"]), "utf-8")
    _, text = run(world, capsys, f"--captions={path}")
    assert f"2 of {len(rows) + 2} captions are of no segment of" in text


def test_without_true_captions_it_counts_agreement(world, capsys):
    """Catches a reference other than the caption that the true embedding retrieves."""
    known, _ = run(world, capsys, f"--captions={world / 'captions.csv'}")
    agreement, text = run(world, capsys, f"--captions={world / 'captions.txt'}")
    assert "caption that the true embedding retrieves" in text and "same" not in text
    # Here the true embedding retrieves the true caption; all of them are in use.
    assert known["captions"] == len(WORDS) and agreement == known


# ---- What is printed and drawn ---------------------------------------------------------


def test_unknown_video_is_one_line(world, capsys):
    """Catches a KeyError for a mistyped name."""
    assert "b/v3.mp4" in error_of(run, world, capsys, "--video", "b/v3.mp4")


def test_default_is_the_longest_video_and_several_can_be_shown(world, capsys):
    """Catches the first video for the longest, and names after the first ignored."""
    assert run(world, capsys)[1].startswith("b/v1.avi")
    text = run(world, capsys, "--video", "a/v2.avi", "b/v3.avi", "--show", 2)[1]
    assert text.index("a/v2.avi") < text.index("b/v3.avi")
    assert text.count("0:00") == 1  # of v2; of v3, the middle:
    assert text.count("0:07") == text.count("0:10") == 1


def test_table_wraps_and_keeps_every_word(capsys):
    """Catches lines that are too wide for a screen, and captions that are cut."""
    words = " ".join(f"word{i}" for i in range(30))
    true = f"0.93 {words}\n0.91 {words}"
    texts = [words, true, f"0.90 {words}"]
    texts = dict(zip(retrieve.COLOURS, texts, strict=True))
    masked = retrieve.Segment(0.0, True, texts)
    visible = retrieve.Segment(3595.0, False, dict.fromkeys(texts, ""))
    retrieve.print_table("a.mp4", [masked, visible])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120 and "59:55" in text
    for i in range(30):
        assert text.count(f"word{i} ") + text.count(f"word{i}\n") == 4


def write_video(path, n_frames=90):
    """Segments of 2.5 s: a white frame, then nine of a grey of 20 x segment."""
    os.makedirs(path.parent)
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    video = cv2.VideoWriter(str(path), codec, 4, (96, 64))
    for frame in range(n_frames):
        grey = 20 * (frame // 10)
        if frame % 10 == 0:
            grey = 255
        video.write(np.full((64, 96, 3), grey, np.uint8))
    video.release()


def test_figure_shows_frames_and_marks_the_masked(world, tmp_path, capsys):
    """Catches frames of other segments, and a red border at the wrong one."""
    write_video(tmp_path / "b/v3.avi")
    figure = tmp_path / "figure.png"
    argv = ["--video", "b/v3.avi", "--show", "8", "--figure", figure]
    _, text = run(world, capsys, *argv, "--videos", tmp_path)
    pixels = np.asarray(Image.open(figure).convert("RGB")).astype(int)
    assert pixels.shape[1] == 1000
    height = (len(pixels) - 40) // 2  # of a row
    is_red = []
    for i in range(8):
        x = 8 + 248 * (i % 4)
        y = 40 + height * (i // 4 + 1) - 58  # 50 above the lower edge of a frame
        assert abs(pixels[y, x + 120] - 20 * i).max() < 8
        is_red.append(pixels[y, x + 2, 0] - pixels[y, x + 2, 1] > 100)
    lines = [line for line in text.splitlines() if line[:1].isdigit()][:8]
    assert is_red == ["▒" in line for line in lines]
    assert any(is_red) and not all(is_red)


def test_frames_of_a_short_and_of_a_missing_segment(world, tmp_path):
    """Catches an empty picture where a segment ends before its middle, or a crash."""
    write_video(tmp_path / "b/short.avi", 4)  # 1 s: a white frame, and three of black
    data = model.load_data(world / "out.npz")
    segments = [retrieve.Segment(start, False, {}) for start in (0.0, 2.5)]
    path = str(tmp_path / "b/short.avi")
    first, missing = retrieve.read_frames(path, data, segments)
    assert np.asarray(first).mean() > 250
    assert (np.asarray(missing) == 230).all()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--figure", "figure.png"], "--videos"),
        (["--figure", "figure.jpg"], ".png"),
        (["--json", "scores.txt"], ".json"),
        (["--json", "file/scores.json"], "cannot be written"),
    ],
)
def test_outputs_are_refused_before_any_work(
    world, tmp_path, capsys, monkeypatch, argv, words
):
    """Catches a figure or scores that cannot be written, found after all the work."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(retrieve, "read_captions", None)  # would be called: TypeError
    assert words in error_of(run, world, capsys, *argv)


@pytest.mark.parametrize("flag", ["--data", "--ckpt", "--captions"])
def test_outputs_do_not_replace_inputs(world, tmp_path, capsys, flag):
    """Catches scores written over the embeddings, the checkpoint or the captions."""
    path = tmp_path / "input.json"
    path.write_text("mine")
    line = error_of(run, world, capsys, flag, path, "--json", path)
    assert "replace an input" in line and path.read_text() == "mine"


def test_a_file_that_is_no_video_is_one_line(world, tmp_path, capsys):
    """Catches a traceback, or an empty figure, where a video cannot be read."""
    os.mkdir(tmp_path / "b")
    (tmp_path / "b/v1.avi").write_text("not a video")
    argv = ["--figure", tmp_path / "figure.png", "--videos", tmp_path]
    assert "v1.avi" in error_of(run, world, capsys, *argv)
    assert not (tmp_path / "figure.png").exists()


def test_command_line(world):
    """Catches a script that works only when imported: the real command, in ASCII."""
    argv = ["--captions", "captions.csv", "--top-k", "2", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, retrieve.__file__, *argv],
        cwd=world,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "true caption" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("chance")
