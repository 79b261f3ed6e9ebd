"""Extraction: videos made on the spot, a tiny open_clip model with random weights, real damage."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import extract

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 64, "heads": 1, "layers": 1, "vocab_size": 64},
}
CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".mkv": "VP80", ".webm": "VP80"}
Capture = cv2.VideoCapture


def write_video(path, seconds, fps=10, seed=0, size=(48, 32)):
    """Draw a disc that wanders over a background that changes slowly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = cv2.VideoWriter_fourcc(*CODECS[path.suffix])
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, codec, fps, size)
    colour = np.random.default_rng(seed).integers(40, 200, 3)
    for i in range(round(seconds * fps)):
        image = np.full((size[1], size[0], 3), colour + 30 * np.sin(i / 40), np.uint8)
        cv2.circle(
            image, (i % size[0], (seed + 1) * i // 3 % size[1]), 6, (255, 255, 0), -1
        )
        writer.write(image)
    writer.release()
    return path


def write_clip(folder, seed=0, vision=CONFIG["vision_cfg"], **preprocess):
    """Make an open_clip folder with random weights."""
    folder.mkdir()
    torch.manual_seed(seed)
    model_config = CONFIG | {"vision_cfg": vision}
    model = open_clip.CLIP(**model_config)
    safetensors.torch.save_file(
        model.state_dict(), folder / "open_clip_model.safetensors"
    )
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
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


def run(videos, out, clip, *flags, code=0):
    """Run the script in this process and return the arrays that it wrote."""
    args = extract.get_args([str(videos), str(out), "--model", str(clip), *flags])
    with pytest.raises(SystemExit) as stop:
        extract.main(args)
    assert stop.value.code == code
    return dict(np.load(out)) if out.exists() else None


def assert_equal(found, expected):
    """Compare two npz files to the last bit."""
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def files_below(folder):
    """Names of all files, to see that nothing is left over."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_segments_and_tails(tmp_path, clip):
    """Segments miscounted: half a segment or more counts, less does not, a short video is one."""
    seconds = {0.3: 1, 2: 1, 5: 1, 7.4: 1, 7.5: 2, 9.9: 2, 12: 2, 12.5: 3}
    for i, length in enumerate(seconds):
        write_video(tmp_path / "v" / f"{i}.mp4", length)
    data = run(tmp_path / "v", tmp_path / "out.npz", clip)
    assert data["lengths"].tolist() == list(seconds.values())
    assert data["starts"].tolist() == [
        5 * i for n in seconds.values() for i in range(n)
    ]
    assert data["embeddings"].dtype == np.float16 and data["starts"].dtype == np.float32
    norms = np.linalg.norm(data["embeddings"].astype(float), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)
    flags = "--segment-seconds", "2.5", "--frames", "3"
    data = run(tmp_path / "v", tmp_path / "out.npz", clip, *flags)
    assert data["lengths"].tolist() == [1, 1, 2, 3, 3, 4, 5, 5]
    assert json.loads(str(data["meta"]))["frames_per_segment"] == 3


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
        "clip.mp4": "not a readable",
        "empty.mp4": "empty",
        "gone.mp4": "not a readable",
        "head.mp4": "no video",
        "pipe.mp4": "not a readable",
        "text.mp4": "no video",
    }
    if sys.platform == "linux":
        (folder / os.fsdecode(b"\xff.mp4")).write_bytes(
            (folder / "x" / "clip.mp4").read_bytes()
        )
        bad["\\udcff.mp4"] = "not a readable file with a UTF-8 name"
    data = run(folder, tmp_path / "out.npz", clip)
    assert data["videos"].tolist() == sorted([*good, "linked/far.avi"])
    assert data["labels"].tolist() == ["", "clip.mp4", "linked", "x", "y"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"5 of {5 + len(bad)} videos, 5 segments; {len(bad)} failed:"
    for line, (name, reason) in zip(said[1:], bad.items(), strict=True):
        assert line.startswith(f"  {name}: {reason}")


def test_nothing_to_extract(tmp_path, clip, capsys):
    """A run without any result ends well, or leaves an empty npz behind."""
    (tmp_path / "v").mkdir()
    with pytest.raises(SystemExit, match="no videos there"):
        extract.main(extract.get_args([str(tmp_path / "v"), "out.npz"]))
    (tmp_path / "v" / "empty.mp4").touch()
    assert run(tmp_path / "v", tmp_path / "out.npz", clip, code=1) is None
    assert "0 of 1 videos, 0 segments; 1 failed:" in capsys.readouterr().out
    assert files_below(tmp_path) == ["v", "v/empty.mp4"]


class Liar:
    """A capture that behaves as odd files do; the real one does the work."""

    header, stamps, is_flaky, lost = {}, "true", False, ()

    def __init__(self, *args):
        self.real, self.n = Capture(*args), 0
        self.has_nonref = "nonref" in os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"]

    def grab(self):
        """Fail, or lose frames, if told to."""
        self.n += 1
        if self.is_flaky and self.n % 4:
            return False
        is_good = self.real.grab()
        while (
            is_good
            and self.has_nonref
            and self.get(cv2.CAP_PROP_POS_MSEC) // 1000 in self.lost
        ):
            is_good = self.real.grab()
        return is_good

    def get(self, key):
        """Tell a lie or the truth."""
        value = self.real.get(key)
        if key == cv2.CAP_PROP_POS_MSEC:
            return {"true": value, "zero": 0.0, "jump": value % 3000, "inf": np.inf}[
                self.stamps
            ]
        return self.header.get(key, value)

    def retrieve(self):
        """Hand on the frame."""
        return self.real.retrieve()


FPS, COUNT = cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT
LIES = {
    "False three times out of four": {"is_flaky": True},
    "fps 0": {"header": {FPS: 0.0}},
    "fps nan": {"header": {FPS: np.nan, COUNT: np.nan}},
    "fps 90000": {"header": {FPS: 9e4, COUNT: -2.8e17}},
    "fps wrong": {"header": {FPS: 13.0, COUNT: 5}},
    "no timestamps": {"stamps": "zero"},
    "timestamps that jump back": {"stamps": "jump"},
    "timestamps without end": {"stamps": "inf"},
    "a segment lost to nonref": {"lost": range(5, 10)},
    "the end lost to nonref": {"lost": range(10, 15)},
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(tmp_path, clip, monkeypatch, lie):
    """A header, a timestamp, one False or the option nonref decides what is extracted."""
    write_video(tmp_path / "v" / "a.avi", 15)
    truth = run(tmp_path / "v", tmp_path / "truth.npz", clip)
    assert truth["lengths"] == 3
    monkeypatch.setattr(cv2, "VideoCapture", type("", (Liar,), LIES[lie]))
    assert_equal(run(tmp_path / "v", tmp_path / "out.npz", clip), truth)
    preprocess = {"size": 32, "resize_mode": "squash", "fill_color": 0}
    frames = list(extract.decode(str(tmp_path / "v" / "a.avi"), 5.0, 8, preprocess))
    assert len(frames) == 3 * 8 + 1 and frames[-1][1] == (
        pytest.approx(15, abs=0.1),
        "",
    )


def test_half_a_video_is_kept_and_named(tmp_path, clip, capsys):
    """A video that breaks off is thrown away, or kept without a word."""
    video = write_video(tmp_path / "v" / "a.mkv", 40)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    data = run(tmp_path / "v", tmp_path / "out.npz", clip)
    assert 2 <= data["lengths"] <= 6
    assert "a.mkv: kept, with" in capsys.readouterr().out


def test_fuzz(tmp_path, clip):
    """A damaged video hangs or stops the run, spoils the good ones, or gives a broken embedding."""
    rng = np.random.default_rng(0)
    for suffix in (".mp4", ".avi", ".webm"):
        whole = write_video(tmp_path / "good" / f"good{suffix}", 4).read_bytes()
        for i in range(70):
            data = np.frombuffer(whole, np.uint8).copy()
            if i % 3 == 0:  # flips
                where = rng.integers(
                    0, len(data) if i % 2 else 2000, rng.integers(1, 300)
                )
                data[where] = rng.integers(0, 256, len(where))
            elif i % 3 == 1:  # truncations
                data = data[: rng.integers(1, len(data))]
            else:  # chunks in another order
                data = np.concatenate(
                    [np.array_split(data, 8)[k] for k in rng.permutation(8)]
                )
            path = tmp_path / "bad" / f"{i}{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data.tobytes())
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


def test_ranks(tmp_path, clip, four, monkeypatch, capsys):
    """Processes lose a video, take one twice, write too early, or write something else."""
    alone = run(four, tmp_path / "alone.npz", clip)
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = extract.get_args(
        [str(four), str(tmp_path / "out.npz"), "--model", str(clip)]
    )
    for rank in "20":
        monkeypatch.setenv("RANK", rank)
        extract.main(args)
        assert "Other processes are not done" in capsys.readouterr().out
        assert not (tmp_path / "out.npz").exists()
    monkeypatch.setenv("RANK", "1")
    assert_equal(run(four, tmp_path / "out.npz", clip), alone)
    assert files_below(tmp_path) == ["alone.npz", "out.npz"]


def test_killed_anywhere(tmp_path, clip, four, monkeypatch):
    """A run that was stopped starts from nothing, reads a half-written file, or ends elsewhere."""
    expected = run(four, tmp_path / "whole.npz", clip)
    out, replace, decode = tmp_path / "out.npz", os.replace, extract.decode

    def stop(*paths):
        raise KeyboardInterrupt

    for n in range(5):  # stopped after n moves; the fifth would move out.npz itself
        out.unlink(missing_ok=True)
        moves = [replace] * n + [stop]
        monkeypatch.setattr(
            os, "replace", lambda *paths, moves=moves: moves.pop(0)(*paths)
        )
        with pytest.raises(KeyboardInterrupt):
            run(four, out, clip)
        assert not out.exists() and len(list(tmp_path.glob("out.npz.parts/*.npz"))) == n
        decoded = []
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(
            extract, "decode", lambda *a, to=decoded: to.append(a) or decode(*a)
        )
        assert_equal(run(four, out, clip), expected)
        assert len(decoded) == 4 - n
        assert files_below(tmp_path) == ["out.npz", "whole.npz"]


KILL = """
import os, signal, sys, extract
def replace(*paths, replace=os.replace):
    if len(os.listdir(sys.argv[2] + ".parts")) == 3:  # two parts, and the third half-way
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace
extract.main(extract.get_args())
"""


def test_sigkill(tmp_path, clip, four):
    """A process killed for real in the middle of a write leaves damage; FFmpeg chatters."""
    videos, out, root = (
        tmp_path / "v",
        tmp_path / "out.npz",
        Path(extract.__file__).parent,
    )
    whole = shutil.copy(
        four / "a.mp4", shutil.copytree(four, videos) / "0.mp4"
    ).read_bytes()
    (videos / "0.mp4").write_bytes(whole[:2000] + b"damage" * 99 + whole[2594:])
    command = [sys.executable, "-c", KILL, str(videos), str(out), "--model", str(clip)]
    killed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert [path.suffix for path in sorted(tmp_path.glob("*.parts/*"))].count(
        ".half"
    ) == 1
    said = re.split(r"[\r\n]+", killed.stderr)
    assert [
        line for line in said if line and "video" not in line
    ] == []  # only the progress bar
    assert_equal(run(videos, out, clip), run(videos, tmp_path / "whole.npz", clip))


def test_changes_are_not_mixed_in(tmp_path, clip, four, monkeypatch):
    """Parts of other settings, of another encoder or of an older video end in the npz."""
    videos = tmp_path / "v"
    shutil.copytree(four, videos)
    weights = write_clip(tmp_path / "other", seed=1) / "open_clip_model.safetensors"
    clip = shutil.copytree(clip, tmp_path / "clip")
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "rmtree", lambda *args, **kwargs: None
        )  # as if killed before
        run(videos, tmp_path / "out.npz", clip, "--frames", "2")
        run(videos, tmp_path / "out.npz", clip)
    weights.replace(clip / weights.name)  # the same folder, another encoder
    time = os.path.getmtime(videos / "a.mp4")
    write_video(videos / "a.mp4", 8, seed=9)  # the same length, another content
    os.utime(videos / "a.mp4", (time + 1, time + 1))
    changed = run(videos, tmp_path / "out.npz", clip)
    assert_equal(changed, run(videos, tmp_path / "whole.npz", clip))
    old = run(four, tmp_path / "old.npz", clip)
    assert (changed["embeddings"][0] != old["embeddings"][0]).any()


def test_full_disk(tmp_path, clip, four, monkeypatch):
    """A full disk ends in a traceback, fills up with half files, or costs what was done."""
    whole, savez = run(four, tmp_path / "whole.npz", clip), np.savez
    args = extract.get_args(
        [str(four), str(tmp_path / "out.npz"), "--model", str(clip)]
    )

    def fill_disk(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for n in (2, 2):  # the second time it is the npz itself that does not fit
        writes = [savez] * n + [fill_disk]
        monkeypatch.setattr(np, "savez", lambda *a, to=writes, **k: to.pop(0)(*a, **k))
        with pytest.raises(
            SystemExit, match="No space left on device.*the same command goes on"
        ):
            extract.main(args)
        assert len(list(tmp_path.glob("*/*.npz"))) >= n and not list(
            tmp_path.glob("*/*.half")
        )
    monkeypatch.setattr(np, "savez", savez)
    assert_equal(run(four, tmp_path / "out.npz", clip), whole)


def test_place_in_the_batch(tmp_path, clip, four):
    """An embedding depends on the frames, the videos or the padding beside it."""
    all_four = run(four, tmp_path / "four.npz", clip)
    for i, name in enumerate(all_four["videos"]):
        path = tmp_path / str(i) / name
        path.parent.mkdir(parents=True)
        shutil.copy(four / name, path)
        data = run(tmp_path / str(i), tmp_path / f"{i}.npz", clip)
        rows = slice(all_four["lengths"][:i].sum(), all_four["lengths"][: i + 1].sum())
        np.testing.assert_array_equal(data["embeddings"], all_four["embeddings"][rows])
    for size in (
        "1",
        "7",
        "500",
    ):  # another batch size may differ in the last bits only
        data = run(four, tmp_path / "out.npz", clip, "--batch-size", size)
        np.testing.assert_allclose(
            data["embeddings"], all_four["embeddings"], atol=1e-3
        )


def natural(rng, height, width):
    """Draw something with the smoothness of a photograph, and edges."""
    image = sum(
        cv2.resize(rng.normal(0, n**-0.7, (n, n, 3)), (width, height), interpolation=2)
        for n in (2, 4, 8, 16, 32, 64, 128, 256)
    )
    image = np.clip(127 + 60 * image + rng.normal(0, 12, image.shape), 0, 255).astype(
        np.uint8
    )
    for _ in range(6):
        corner, colour = (
            rng.integers(0, (width, height)),
            rng.integers(0, 256, 3).tolist(),
        )
        cv2.circle(
            image, corner.tolist(), int(rng.integers(5, height // 3)), colour, -1
        )
    return image


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_frames_as_open_clip_sees_them(tmp_path, mode):
    """Crop, resize, colours or normalisation differ from open_clip's own transform."""
    stats = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "resize_mode": mode}
    vision = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 16}
    folder = write_clip(tmp_path / "clip", vision=vision, **stats)
    model, name = extract.load_encoder(str(folder), "", torch.device("cpu"))
    assert name == f"local-dir:{folder}" and not model.training
    preprocess = open_clip.get_model_preprocess_cfg(model)
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    rng = np.random.default_rng(0)
    sizes = [(360, 640), (720, 1280), (600, 400), (90, 120)] * 4
    images = [natural(rng, *size) for size in sizes]
    frames = [extract.fit(image, preprocess) for image in images]
    ours = extract.embed(frames, model, preprocess, 16)
    theirs = torch.stack(
        [transform(Image.fromarray(image[:, :, ::-1])) for image in images]
    )
    theirs = torch.nn.functional.normalize(model.encode_image(theirs), dim=1).detach()
    mean = theirs.mean(dim=0)
    cosine = torch.cosine_similarity(ours - mean, theirs - mean)
    assert cosine.mean() > 0.9995 and cosine.min() > 0.998, cosine
    for n in (1, 2, 3):  # to the last bit, however full the batch is
        assert torch.equal(
            extract.embed(frames[:n], model, preprocess, 16)[:n], ours[:n]
        )


def test_no_weights(tmp_path, clip, monkeypatch, capfd, caplog):
    """Weights that cannot be had cost a minute, a page of log, or are replaced by random ones."""
    waited = []

    def offline(*args, **kwargs):
        waited.append(1)
        raise OSError

    monkeypatch.setattr("socket.create_connection", offline)
    monkeypatch.setattr(
        "time.sleep", waited.append
    )  # huggingface_hub sleeps between its retries
    monkeypatch.setattr(extract, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
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
        assert "\n" not in message and len(message) < 500
    assert waited == [1, 1, 1]
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_encoder_that_gives_nan(tmp_path, clip, four, monkeypatch, capsys):
    """Embeddings that are not finite reach the npz."""
    broken = lambda frames, *_: torch.full((len(frames), 64), torch.nan)  # noqa: E731
    monkeypatch.setattr(extract, "embed", broken)
    assert run(four, tmp_path / "out.npz", clip, code=1) is None
    assert capsys.readouterr().out.count("zeros or non-finite numbers") == 4


def test_flags(tmp_path, capsys):
    """Impossible values end in a traceback; the help forgets a default."""
    for flags in (
        ["--frames", "0"],
        ["--segment-seconds", "0"],
        ["--segment-seconds", "nan"],
    ):
        with pytest.raises(SystemExit, match="expected --frames and"):
            extract.main(extract.get_args([str(tmp_path), "out.npz", *flags]))
    with pytest.raises(SystemExit):
        extract.get_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in vars(extract.get_args(["videos", "out.npz"])).values():
        assert f"(default: {default})" in text or default in ("videos", "out.npz")
