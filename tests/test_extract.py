"""Extraction: videos made on the spot, a tiny open_clip model with random weights, real damage."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

import extract

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 64, "heads": 1, "layers": 1, "vocab_size": 64},
}
CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".mkv": "VP80", ".webm": "VP80"}
SCRIPT = Path(extract.__file__)


def write_video(path, seconds, fps=10, seed=0, size=(48, 32)):
    """Draw a disc that wanders over a background that changes slowly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = cv2.VideoWriter_fourcc(*CODECS[path.suffix])
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, codec, fps, size)
    colour = np.random.default_rng(seed).integers(40, 200, 3)
    for i in range(round(seconds * fps)):
        image = np.full((size[1], size[0], 3), colour + 30 * np.sin(i / 40), np.uint8)
        centre = (i % size[0], (seed + 1) * i // 3 % size[1])
        cv2.circle(image, centre, 6, (255, 255, 0), -1)
        writer.write(image)
    writer.release()
    return path


def write_clip(folder, seed=0, vision=CONFIG["vision_cfg"], **preprocess):
    """Make an open_clip folder with random weights."""
    folder.mkdir()
    torch.manual_seed(seed)
    config = CONFIG | {"vision_cfg": vision}
    weights = open_clip.CLIP(**config).state_dict()
    safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
    config = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An encoder folder."""
    return write_clip(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four videos of different containers and lengths."""
    folder = tmp_path_factory.mktemp("four")
    for i, name in enumerate(["a.mp4", "b/a.mp4", "b/c.avi", "d.webm"]):
        write_video(folder / name, 8 + i, seed=i)
    return folder


def arguments(videos, out, clip, *flags):
    """Arguments of the script, as main takes them."""
    return extract.get_args([str(videos), str(out), "--model", str(clip), *flags])


def run(videos, out, clip, *flags):
    """Run the script in this process and return the arrays that it wrote."""
    extract.main(arguments(videos, out, clip, *flags))
    return dict(np.load(out))


def assert_equal(found, expected):
    """Compare two npz files to the last bit."""
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def files_below(folder):
    """Names of all files, to see that nothing is left over."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def stop_before_the_end(four, out, clip, monkeypatch):
    """Leave what a run leaves that was stopped when all parts were there."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "remove_parts", stop)
        with pytest.raises(KeyboardInterrupt):
            extract.main(arguments(four, out, clip))
    out.unlink()
    return Path(f"{out}.parts")


# ---- Segments and frames ---------------------------------------------------------------


def test_segments_and_tails(tmp_path, clip):
    """Segments miscounted: half a segment or more counts, less does not, a short video is one."""
    seconds = {0.3: 1, 2: 1, 5: 1, 7.4: 1, 7.5: 2, 9.9: 2, 12: 2, 12.5: 3}
    for i, length in enumerate(seconds):
        write_video(tmp_path / "v" / f"{i}.mp4", length)
    data = run(tmp_path / "v", tmp_path / "out.npz", clip)
    assert data["lengths"].tolist() == list(seconds.values())
    starts = [5 * i for n in seconds.values() for i in range(n)]
    assert data["starts"].tolist() == starts
    assert data["embeddings"].dtype == np.float16 and data["starts"].dtype == np.float32
    norms = np.linalg.norm(data["embeddings"].astype(float), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)
    meta = {"segment_seconds": 5.0, "frames_per_segment": 8}
    assert json.loads(str(data["meta"])) == meta | {
        "model": str(clip),
        "pretrained": "",
    }
    flags = "--segment-seconds", "2.5", "--frames", "3"
    data = run(tmp_path / "v", tmp_path / "out.npz", clip, *flags)
    assert data["lengths"].tolist() == [1, 1, 2, 3, 3, 4, 5, 5]
    assert json.loads(str(data["meta"]))["frames_per_segment"] == 3


def test_slots_are_the_right_frames(tmp_path):
    """A frame is of the wrong moment, one is left out at the end, or red is blue."""
    path = str(tmp_path / "a.avi")
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, codec, 10, (48, 32))
    for i in range(120):  # the red grows with time
        writer.write(np.full((32, 48, 3), (0, 0, 2 * i), np.uint8))
    writer.release()
    for n, numbers in (2, [0, 25, 50, 75, 100]), (1, [0, 50, 100]):
        frames = list(extract.decode(path, 5.0, n))
        places = [(segment, slot) for segment, slot, _ in frames]
        assert places == [(i // n, i % n) for i in range(len(numbers))]
        for (_, _, frame), number in zip(frames, numbers, strict=True):
            assert frame.shape == (32, 48, 3) and frame.dtype == np.uint8
            np.testing.assert_allclose(frame[..., 0], 2 * number, atol=6)
            assert frame[..., 1:].max() < 10


def test_other_videos(tmp_path, clip, four):
    """An embedding depends on the other videos, or on the segments beside it."""
    all_four = run(four, tmp_path / "four.npz", clip)
    rows = np.split(all_four["embeddings"], all_four["lengths"].cumsum()[:-1])
    for i, name in enumerate(all_four["videos"]):
        path = tmp_path / str(i) / name
        path.parent.mkdir(parents=True)
        shutil.copy(four / name, path)
        data = run(tmp_path / str(i), tmp_path / f"{i}.npz", clip)
        np.testing.assert_array_equal(data["embeddings"], rows[i])
    path = str(four / "d.webm")
    model, preprocess = extract.load_encoder(str(clip), "", torch.device("cpu"))
    for segment in (0, 1):
        frames = [item for item in extract.decode(path, 5.0, 8) if item[0] == segment]
        images = [preprocess(Image.fromarray(frame)) for _, _, frame in frames]
        mean = extract.encode_images(torch.stack(images), model).mean(dim=0)
        np.testing.assert_allclose(
            rows[3][segment], F.normalize(mean, dim=0), atol=1e-3
        )


def natural(rng, height, width):
    """Draw something with the smoothness of a photograph, and edges."""
    image = np.zeros((height, width, 3))
    for n in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = rng.normal(0, n**-0.7, (n, n, 3))
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    image = 127 + 60 * image + rng.normal(0, 12, image.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(6):
        centre = rng.integers(0, (width, height)).tolist()
        colour = rng.integers(0, 256, 3).tolist()
        cv2.circle(image, centre, int(rng.integers(5, height // 3)), colour, -1)
    return image


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_frames_as_open_clip_sees_them(tmp_path, mode):
    """The shrink before open_clip's own transform changes what the encoder sees."""
    stats = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "resize_mode": mode}
    vision = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 16}
    folder = write_clip(tmp_path / "clip", vision=vision, **stats)
    device = torch.device("cpu")
    model, preprocess = extract.load_encoder(str(folder), "", device)
    assert not model.training
    rng = np.random.default_rng(0)
    sizes = [(360, 640), (720, 1280), (600, 400), (90, 120)] * 4
    images = [natural(rng, *size) for size in sizes]
    frames = [(5, slot, image) for slot, image in enumerate(images)]
    ((segment, batch),) = extract.batches(frames, preprocess, 224)
    assert segment == 5 and len(batch) == 16
    ours = extract.encode_images(batch, model)
    theirs = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    theirs = F.normalize(model.encode_image(theirs), dim=1).detach()
    mean = theirs.mean(dim=0)
    cosine = torch.cosine_similarity(ours - mean, theirs - mean)
    assert cosine.mean() > 0.9995 and cosine.min() > 0.998, cosine


# ---- Odd files -------------------------------------------------------------------------


def test_any_folder(tmp_path, clip, capsys):
    """A file that is no video stops the run, is kept in silence, or hides a good one."""
    good = ["a b ü%d.mp4", "clip.mp4/clip.mp4", "x/clip.mp4", "x/y/clip.MP4"]
    for i, name in enumerate(good):
        path = write_video((tmp_path / "v" / name).with_suffix(".mp4"), 6, seed=i)
        path.rename(tmp_path / "v" / name)
    folder = tmp_path / "v"
    (folder / "x" / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(write_video(tmp_path / "z" / "far.avi", 6).parent)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 99)
    (folder / "gone.mp4").symlink_to("nowhere")
    (folder / "notes.txt").write_text("not touched")
    (folder / "head.mp4").write_bytes((folder / "x" / "clip.mp4").read_bytes()[:3000])
    os.mkfifo(folder / "pipe.mp4")
    bad = {
        "empty.mp4": "empty",
        "gone.mp4": "no regular file",
        "head.mp4": "no video",
        "pipe.mp4": "no regular file",
        "text.mp4": "no video",
    }
    if sys.platform == "linux":
        name = os.fsdecode(b"\xff.mp4")
        shutil.copy(folder / "x" / "clip.mp4", folder / name)
        bad["\\udcff.mp4"] = "its name is not UTF-8"
    data = run(folder, tmp_path / "out.npz", clip)
    assert data["videos"].tolist() == sorted([*good, "linked/far.avi"])
    assert data["labels"].tolist() == ["", "clip.mp4", "linked", "x", "y"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"5 of {5 + len(bad)} videos, 5 segments; {len(bad)} failed"
    for line, (name, reason) in zip(said[1:], bad.items(), strict=True):
        assert line.startswith(f"  {name}: {reason}")
    assert sorted(os.listdir(tmp_path)) == ["out.npz", "v", "z"]


def test_nothing_to_extract(tmp_path, clip, capsys):
    """A run without any result ends well, or leaves an empty npz behind."""
    out = tmp_path / "out.npz"
    (tmp_path / "v").mkdir()
    with pytest.raises(SystemExit, match="no videos there"):
        extract.main(arguments(tmp_path / "v", out, clip))
    (tmp_path / "v" / "empty.mp4").touch()
    with pytest.raises(
        SystemExit, match="expected weights"
    ):  # and no settings are kept
        extract.main(arguments(tmp_path / "v", out, tmp_path))
    assert files_below(tmp_path) == ["v", "v/empty.mp4"]
    with pytest.raises(SystemExit, match="not written"):
        extract.main(arguments(tmp_path / "v", out, clip))
    assert "0 of 1 videos, 0 segments; 1 failed\n" in capsys.readouterr().out
    assert files_below(tmp_path) == ["v", "v/empty.mp4"]


def test_colon(tmp_path, clip, monkeypatch):
    """A relative path with a colon is taken for a protocol, and every video fails."""
    write_video(tmp_path / "a:b" / "c:d.mp4", 6)
    monkeypatch.chdir(tmp_path)
    assert run("a:b", Path("out.npz"), clip)["lengths"] == 1


def test_thin_frames(tmp_path, clip):
    """A frame of 4096 x 2 pixels stops the run."""
    write_video(tmp_path / "v" / "thin.avi", 1, size=(4096, 2))
    assert run(tmp_path / "v", tmp_path / "out.npz", clip)["lengths"] == 1


class Liar:
    """A capture that behaves as odd files do; the real one does the work."""

    Capture = cv2.VideoCapture
    header = {}
    stamps = "true"
    is_flaky = False
    is_blind = False
    is_black = False

    def __init__(self, *args):
        self.real = self.Capture(*args)
        self.n = 0

    def isOpened(self):
        return self.real.isOpened()

    def grab(self):
        """Fail if told to."""
        self.n += 1
        if self.is_blind or (self.is_flaky and self.n % 4):
            return False
        return self.real.grab()

    def get(self, key):
        """Tell a lie or the truth."""
        value = self.real.get(key)
        if key == cv2.CAP_PROP_POS_MSEC:
            stamps = {"true": value, "zero": 0.0, "jump": value % 3000, "inf": np.inf}
            stamps |= {"sparse": 50 * value, "late": value + 20000}
            return stamps[self.stamps]
        return self.header.get(key, value)

    def retrieve(self):
        """Hand on the frame, unless told not to."""
        if self.is_black:
            return False, None
        return self.real.retrieve()


FPS = cv2.CAP_PROP_FPS
COUNT = cv2.CAP_PROP_FRAME_COUNT
LIES = {
    "False three times out of four": {"is_flaky": True},
    "fps 0": {"header": {FPS: 0.0}},
    "fps nan": {"header": {FPS: np.nan, COUNT: np.nan}},
    "fps 90000": {"header": {FPS: 9e4, COUNT: -2.8e17}},
    "fps wrong": {"header": {FPS: 13.0, COUNT: 5}},
    "no timestamps": {"stamps": "zero"},
    "timestamps that jump back": {"stamps": "jump"},
    "timestamps without end": {"stamps": "inf"},
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(tmp_path, clip, monkeypatch, capsys, lie):
    """A header, a timestamp or one False decides what is extracted."""
    write_video(tmp_path / "v" / "a.avi", 15)
    truth = run(tmp_path / "v", tmp_path / "truth.npz", clip)
    assert truth["lengths"] == 3
    monkeypatch.setattr(cv2, "VideoCapture", type("Lie", (Liar,), LIES[lie]))
    assert_equal(run(tmp_path / "v", tmp_path / "out.npz", clip), truth)
    assert "kept" not in capsys.readouterr().out
    frames = list(extract.decode(str(tmp_path / "v" / "a.avi"), 5.0, 8))
    assert [frame[:2] for frame in frames] == [(i // 8, i % 8) for i in range(24)]


@pytest.mark.parametrize(
    "stamps, starts", [("sparse", [0, 5, 10, 15, 20]), ("late", [20])]
)
def test_sparse_and_late_frames(tmp_path, clip, monkeypatch, stamps, starts):
    """A segment with one frame, or a first one that is not at 0, is taken for a short tail."""
    write_video(tmp_path / "v" / "a.avi", 0.6)
    monkeypatch.setattr(cv2, "VideoCapture", type("Lie", (Liar,), {"stamps": stamps}))
    data = run(tmp_path / "v", tmp_path / "out.npz", clip)
    assert data["starts"].tolist() == starts


@pytest.mark.parametrize("lie", ["is_blind", "is_black"])
def test_codec_that_opencv_lacks(four, monkeypatch, lie):
    """A user whose videos are AV1, of which OpenCV gives no frame, does not learn why."""
    code = cv2.VideoWriter_fourcc(*"AV01")
    lie = {lie: True, "header": {cv2.CAP_PROP_FOURCC: code}}
    monkeypatch.setattr(cv2, "VideoCapture", type("Lie", (Liar,), lie))
    with pytest.raises(extract.BadVideo, match="AV01.*no AV1.*ffmpeg -i"):
        list(extract.decode(str(four / "a.mp4"), 5.0, 8))


def test_half_a_video_is_kept_and_named(tmp_path, clip, capsys):
    """A video that breaks off is thrown away, or kept without a word."""
    video = write_video(tmp_path / "v" / "a.mkv", 40)
    write_video(tmp_path / "v" / "whole.mkv", 40)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    data = run(tmp_path / "v", tmp_path / "out.npz", clip)
    assert 2 <= data["lengths"][0] <= 6 and data["lengths"][1] == 8
    first, second = capsys.readouterr().out.splitlines()
    assert first == "2 of 2 videos, %d segments; 0 failed" % sum(data["lengths"])
    pattern = r"  a.mkv: kept, with (\S+) s of the 40.0 s in its header"
    seconds = float(re.fullmatch(pattern, second).group(1))
    assert abs(seconds - 5 * data["lengths"][0]) <= 2.5


def test_slides(tmp_path, clip, capsys):
    """Segments in which no frame begins are missing without a word."""
    write_video(tmp_path / "v" / "a.avi", 120, fps=0.1)
    data = run(tmp_path / "v", tmp_path / "out.npz", clip)
    assert data["starts"].tolist() == list(range(0, 120, 10))
    assert "a.avi: kept, without 11 segments in which no" in capsys.readouterr().out


def test_few_frames(tmp_path, clip):
    """Frames that no other frame needs are skipped where each one counts."""
    path = write_video(tmp_path / "v" / "a.avi", 20, fps=2)
    frames = list(extract.decode(str(path), 5.0, 8))
    assert [segment for segment, _, _ in frames] == [0] * 8 + [1] * 8 + [2] * 8 + [
        3
    ] * 8


def damage(data, kind, rng):
    """Flip bytes, cut the end off, or put the pieces in another order."""
    data = np.frombuffer(data, np.uint8).copy()
    if kind == "cut":
        return data[: rng.integers(1, len(data))]
    if kind == "shuffled":
        pieces = np.array_split(data, 8)
        return np.concatenate([pieces[k] for k in rng.permutation(8)])
    end = 2000 if kind == "head" else len(data)
    where = rng.integers(0, end, rng.integers(1, 300))
    data[where] = rng.integers(0, 256, len(where))
    return data


def test_fuzz(tmp_path, clip):
    """A damaged video hangs or stops the run, spoils the good ones, or gives a broken embedding."""
    rng = np.random.default_rng(0)
    (tmp_path / "bad").mkdir()
    for suffix in (".mp4", ".avi", ".webm"):
        whole = write_video(tmp_path / "good" / f"good{suffix}", 4).read_bytes()
        for i in range(72):
            kind = ("head", "body", "cut", "shuffled")[i % 4]
            data = damage(whole, kind, rng)
            (tmp_path / "bad" / f"{i}{suffix}").write_bytes(data.tobytes())
    good = run(tmp_path / "good", tmp_path / "good.npz", clip)
    for path in (tmp_path / "good").iterdir():
        path.rename(tmp_path / "bad" / path.name)
    data = run(tmp_path / "bad", tmp_path / "bad.npz", clip)
    rows = np.split(data["embeddings"], data["lengths"].cumsum()[:-1])
    rows = dict(zip(data["videos"].tolist(), rows, strict=True))
    for name, row in zip(good["videos"].tolist(), good["embeddings"], strict=True):
        np.testing.assert_array_equal(rows[name], row[None])
    norms = np.linalg.norm(data["embeddings"].astype(float), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)


# ---- Stop and go on, several processes -------------------------------------------------


def test_ranks(tmp_path, clip, four, monkeypatch, capsys):
    """Processes lose a video, take one twice, write too early, or write something else."""
    out = tmp_path / "out.npz"
    alone = run(four, tmp_path / "alone.npz", clip)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "20":
        monkeypatch.setenv("RANK", rank)
        extract.main(arguments(four, out, clip))
        assert "Parts are missing: others make them" in capsys.readouterr().out
        assert not out.exists()
    monkeypatch.setenv("RANK", "1")
    assert_equal(run(four, out, clip), alone)
    assert files_below(tmp_path) == ["alone.npz", "out.npz"]
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="RANK 3 of WORLD_SIZE 3"):
        extract.main(arguments(four, out, clip))


def test_killed_anywhere(tmp_path, clip, four, monkeypatch):
    """A run that was stopped starts from nothing, reads a half-written file, or ends elsewhere."""
    expected = run(four, tmp_path / "whole.npz", clip)
    out = tmp_path / "out.npz"
    replace = os.replace
    embed_video = extract.embed_video

    def stop(*_):
        raise KeyboardInterrupt

    for n in range(6):  # stopped after n moves: of the settings, four parts, the npz
        out.unlink(missing_ok=True)
        moves = [replace] * n + [stop]
        embedded = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *a, to=moves: to.pop(0)(*a))
            with pytest.raises(KeyboardInterrupt):
                extract.main(arguments(four, out, clip))
        assert not out.exists() and len(list(tmp_path.glob("*.parts/*"))) == n
        with monkeypatch.context() as patch:
            spy = lambda *a, to=embedded: to.append(a) or embed_video(*a)  # noqa: E731
            patch.setattr(extract, "embed_video", spy)
            assert_equal(run(four, out, clip), expected)
        assert len(embedded) == 5 - max(n, 1)
        assert files_below(tmp_path) == ["out.npz", "whole.npz"]


KILL = """
import os, signal, sys, extract
def replace(*paths, replace=os.replace):
    if len(os.listdir(sys.argv[2] + ".parts")) == 4:  # two parts, and the third half-way
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace
extract.main(extract.get_args())
"""


def test_sigkill(tmp_path, clip, four):
    """A process killed for real in the middle of a write leaves damage; FFmpeg chatters."""
    videos = shutil.copytree(four, tmp_path / "v")
    whole = (four / "a.mp4").read_bytes()
    (videos / "0.mp4").write_bytes(whole[:2000] + b"damage" * 99 + whole[2594:])
    out = tmp_path / "out.npz"
    command = [sys.executable, "-c", KILL, str(videos), str(out), "--model", str(clip)]
    killed = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert len(list(tmp_path.glob("*.parts/*.tmp"))) == 1
    said = re.split(r"[\r\n]+", killed.stderr)
    assert [line for line in said if line and "video" not in line] == []
    assert_equal(run(videos, out, clip), run(videos, tmp_path / "whole.npz", clip))
    assert sorted(os.listdir(tmp_path)) == ["out.npz", "v", "whole.npz"]


def test_sigint(tmp_path, clip, four):
    """Ctrl-C ends in a traceback, hangs, or leaves something that the next run stumbles over."""
    videos = tmp_path / "v"
    for i in range(100):
        path = videos / f"{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(four / "a.mp4")
    out = tmp_path / "out.npz"
    command = [sys.executable, str(SCRIPT), str(videos), str(out), "--model", str(clip)]

    def heed_sigint():  # also where the tests run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_sigint
    )
    while len(list(tmp_path.glob("*.parts/*"))) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].strip()
    assert process.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1] == "stopped; the same command goes on from here"
    assert len(run(videos, out, clip)["lengths"]) == 100


@pytest.mark.parametrize(
    "flags", [["--frames", "2"], ["--segment-seconds", "4"], ["--model", "another"]]
)
def test_other_settings(tmp_path, clip, four, monkeypatch, flags):
    """Parts of other settings, or of another encoder, end in the npz."""
    shutil.copytree(clip, tmp_path / "another")
    monkeypatch.chdir(tmp_path)
    out = Path("out.npz")
    parts = stop_before_the_end(four, out, clip, monkeypatch)
    before = {path: path.read_bytes() for path in parts.iterdir()}
    expected = "(frames_per|segment_s|model).*delete the folder, or take another name"
    with pytest.raises(SystemExit, match=expected) as stop:
        extract.main(arguments(four, out, clip, *flags))
    assert "\n" not in str(stop.value) and "pretrained" not in str(stop.value)
    assert {path: path.read_bytes() for path in parts.iterdir()} == before
    run(four, out, clip)  # as before: goes on
    (tmp_path / "out.npz.parts").mkdir()
    (tmp_path / "out.npz.parts" / "settings.json").touch()  # cut, by a power failure
    with pytest.raises(SystemExit, match="delete the folder, or take another name"):
        extract.main(arguments(four, out, clip))


def test_other_weights_in_the_same_folder(tmp_path, clip, four, monkeypatch):
    """Parts of two encoders, one put in the place of the other, end in one npz."""
    folder = shutil.copytree(clip, tmp_path / "clip")
    stop_before_the_end(four, tmp_path / "out.npz", folder, monkeypatch)
    weights = folder / "open_clip_model.safetensors"
    stamp = os.path.getmtime(weights) + 9
    os.utime(weights, (stamp, stamp))
    with pytest.raises(SystemExit, match="found weights .*delete the folder"):
        extract.main(arguments(four, tmp_path / "out.npz", folder))


def test_changed_video(tmp_path, clip, four, monkeypatch, capsys):
    """The part of an older state of a video ends in the npz."""
    videos = shutil.copytree(four, tmp_path / "v")
    out = tmp_path / "out.npz"
    stop_before_the_end(videos, out, clip, monkeypatch)
    stamp = os.path.getmtime(videos / "a.mp4")
    write_video(videos / "a.mp4", 8, seed=9)  # the same length, another content
    os.utime(videos / "a.mp4", (stamp + 1, stamp + 1))
    changed = run(videos, out, clip)
    assert "a.mp4: changed, embedded anew" in capsys.readouterr().out
    assert_equal(changed, run(videos, tmp_path / "whole.npz", clip))
    old = run(four, tmp_path / "old.npz", clip)
    assert (changed["embeddings"][0] != old["embeddings"][0]).any()


def test_damaged_part(tmp_path, clip, four, monkeypatch, capsys):
    """A part with a wrong byte, or cut, is trusted or stops the run for good."""
    out = tmp_path / "out.npz"
    expected = run(four, tmp_path / "whole.npz", clip)
    parts = stop_before_the_end(four, out, clip, monkeypatch)
    video = "b/c.avi"
    path = Path(extract.part_path(str(parts), video))
    whole = path.read_bytes()
    args = str(parts), str(four / video), video
    rng = np.random.default_rng(0)
    truth = extract.read_part(*args)
    capsys.readouterr()
    directory = whole.index(b"PK\x01\x02")  # no checksum: a name or an entry gets lost
    places = [*range(0, directory, 7), *range(directory, len(whole))]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        part = extract.read_part(*args)
        if part is None:
            assert "b/c.avi: " in capsys.readouterr().out
        else:  # a byte of the zip that means nothing
            assert_equal(part, truth)
    place = whole.index(truth["embeddings"].tobytes())
    for data in (whole[: place + 20], b"", whole[:place] + b"?" + whole[place + 1 :]):
        path.write_bytes(data)
        assert extract.read_part(*args) is None
    assert_equal(run(four, out, clip), expected)
    assert "b/c.avi: damaged part, embedded anew" in capsys.readouterr().out


def test_only_own_parts_are_removed(tmp_path, clip, four, monkeypatch):
    """The folder of parts goes, with a user's file or another run's parts in it."""
    out = tmp_path / "out.npz"
    write_video(tmp_path / "other" / "z.mp4", 6)
    parts = stop_before_the_end(tmp_path / "other", out, clip, monkeypatch)
    others = sorted(os.listdir(parts))
    run(four, out, clip)
    assert sorted(os.listdir(parts)) == others and "settings.json" in others
    run(tmp_path / "other", out, clip)
    assert not parts.exists()
    parts.mkdir()
    (parts / "mine.txt").write_text("mine")
    run(four, out, clip)
    assert sorted(os.listdir(parts)) == ["mine.txt", "settings.json"]


def test_outputs(tmp_path, clip, four):
    """The npz replaces a video, or it turns out after hours that it cannot be written."""
    video = shutil.copy(four / "a.mp4", tmp_path / "a.mp4")
    (tmp_path / "link.npz").symlink_to(video)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    before = files_below(tmp_path), Path(video).read_bytes()
    for out in ("a.mp4", "link.npz", "folder.npz", "file/out.npz", "out.txt"):
        with pytest.raises(SystemExit, match=out):
            extract.main(arguments(tmp_path, tmp_path / out, clip))
    assert (files_below(tmp_path), Path(video).read_bytes()) == before


def test_full_disk(tmp_path, clip, four, monkeypatch):
    """A full disk ends in a traceback, fills up with half files, or costs what was done."""
    whole = run(four, tmp_path / "whole.npz", clip)
    out = tmp_path / "out.npz"
    savez = np.savez

    def fill_disk(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for n in (2, 2):  # the second time it is the npz itself that does not fit
        writes = [savez] * n + [fill_disk]
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", lambda *a, to=writes, **k: to.pop(0)(*a, **k))
            with pytest.raises(SystemExit, match="No space left on device"):
                extract.main(arguments(four, out, clip))
        assert len(list(tmp_path.glob("*/*.npz"))) >= n and not out.exists()
        assert not list(tmp_path.rglob("*.tmp"))
    assert_equal(run(four, out, clip), whole)


# ---- Encoders and flags ----------------------------------------------------------------


def test_no_weights(tmp_path, clip, monkeypatch, capfd, caplog):
    """Weights that cannot be had cost pages of log, or are replaced by random ones."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "config-only").mkdir()
    shutil.copy(clip / "open_clip_config.json", tmp_path / "config-only")
    (tmp_path / "broken.pt").write_bytes(b"broken")
    for model, weights in [
        ("ViT-B-32", "datacomp_xl_s13b_b90k"),
        ("ViT-B-32", "no-such-tag"),
        ("nothing", "openai"),
        (tmp_path / "config-only", ""),
        (tmp_path, ""),
        ("ViT-B-32", tmp_path / "broken.pt"),
    ]:
        with pytest.raises(SystemExit) as stop:
            extract.load_encoder(str(model), str(weights), torch.device("cpu"))
        message = str(stop.value)
        assert message.startswith(f"--model {model} --pretrained {weights}: found ")
        assert "--model FOLDER" in message and "--pretrained FILE" in message
        assert "\n" not in message and len(message) < 600
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_wrong_activation(tmp_path, monkeypatch):
    """OpenAI's weights, under a name without -quickgelu, embed wrongly with only a warning."""
    downloaded = lambda *_, **__: str(tmp_path / "weights.pt")  # noqa: E731
    monkeypatch.setattr(open_clip.factory, "download_pretrained", downloaded)
    with pytest.raises(SystemExit, match="QuickGELU mismatch"):
        extract.load_encoder("ViT-B-32", "openai", torch.device("cpu"))


def test_tokenizer_name(clip, monkeypatch):
    """A folder whose name is relative, or that of a model, is not found by get_tokenizer."""
    monkeypatch.chdir(clip.parent)
    for model in (clip, clip.name):
        name = extract.encoder_name(str(model))
        assert open_clip.get_tokenizer(name)(["a dog"]).shape == (1, 77)
    assert extract.encoder_name("ViT-B-32") == "ViT-B-32"


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_encoder_that_gives_nan(tmp_path, clip, four, monkeypatch, capsys, value):
    """Embeddings that are zero or not finite reach the npz."""
    broken = lambda images, *_: torch.full((len(images), 64), value)  # noqa: E731
    monkeypatch.setattr(extract, "encode_images", broken)
    with pytest.raises(SystemExit, match="not written"):
        extract.main(arguments(four, tmp_path / "out.npz", clip))
    assert capsys.readouterr().out.count("zeros or non-finite numbers") == 4


def test_frame_that_a_library_refuses(tmp_path, clip, four, monkeypatch, capsys):
    """An error of OpenCV or Pillow on one odd video stops the run for all."""

    def fail(*_):
        raise ValueError("odd frame")

    monkeypatch.setattr(extract, "shrink", fail)
    with pytest.raises(SystemExit, match="not written"):
        extract.main(arguments(four, tmp_path / "out.npz", clip))
    assert capsys.readouterr().out.count("odd frame") == 4


def test_a_bug_is_no_bad_video(tmp_path, clip, four, monkeypatch):
    """An error of the encoder, such as memory that is full, makes every video a failed one."""

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(extract, "encode_images", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        extract.main(arguments(four, tmp_path / "out.npz", clip))


def test_flags(capsys):
    """Impossible values end in a traceback; the help forgets a default."""
    for flag in ("--frames", "--segment-seconds"):
        for value in ("0", "-1", "nan", "inf", "x"):
            with pytest.raises(SystemExit):
                extract.get_args(["v", "out.npz", flag, value])
            assert flag in capsys.readouterr().err
    with pytest.raises(SystemExit):
        extract.get_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in vars(extract.get_args(["videos", "out.npz"])).values():
        assert f"(default: {default})" in text or default in ("videos", "out.npz")
