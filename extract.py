"""Stage 1 of LV-MAE: cut every video of a folder into 5-second segments and embed each of them.

Section 3.1: a video is N consecutive segments of frames; a frozen encoder turns each into one
embedding. Here that is an image tower of open_clip and the mean over the frames of a segment.

    python extract.py videos/ out.npz                       # ViT-B-32, downloaded on first use
    python extract.py videos/ out.npz --model FOLDER        # an open_clip model on disk
    torchrun --nproc-per-node 2 extract.py videos/ out.npz  # two processes share the videos

It ends with "97 of 100 videos, 4,812 segments; 3 failed:" and the list of these; ViT-B-32 takes 1.6
core seconds per segment of 720p video. If it is stopped, the same command goes on from there.
Processes on one file system split the videos by RANK and WORLD_SIZE, which torchrun sets; the last
to finish writes out.npz, V videos of S segments in all: embeddings (S, D) float16 of unit length,
lengths (V,), starts (S,) in seconds, videos (V,) paths, labels (V,) folder names, and meta, JSON.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import time
from itertools import islice
from pathlib import Path
from urllib.request import getproxies

import cv2
import huggingface_hub
import numpy as np
import open_clip
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from model import explain, pick_device, prefetch, require

VIDEO_ENDINGS = (".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
                 ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv")


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("videos", help="folder of videos, searched with its subfolders")
    add("out", help="npz file to write")
    # Encoder
    add("--model", default="ViT-B-32", help="open_clip model: a name, or its folder")
    add("--pretrained", default="datacomp_xl_s13b_b90k", help="weights of a model name: open_clip "
        "tag, or file (then normalised as OpenAI's are; a folder knows its own way)")
    # Segments
    add("--segment-seconds", type=float, default=5.0, help="length of a segment")
    add("--frames", type=int, default=8, help="frames per segment, evenly spaced")
    # Machine
    add("--batch-size", type=int, default=0, help="frames; 0: 16 on CPU, 256 on GPU")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where")
    return parser.parse_args(argv)


def find_videos(root):
    """List the videos below `root`, sorted, as paths relative to it."""
    videos, visited = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=print):
        if os.path.realpath(folder) in visited:  # a link to a folder above makes a loop
            subfolders[:] = files[:] = []
        visited.add(os.path.realpath(folder))
        subfolders.sort()
        videos += [Path(folder, name).relative_to(root).as_posix() for name in subfolders + files
                   if name.lower().endswith(VIDEO_ENDINGS)]
    return sorted(videos)


def load_encoder(model, pretrained, device):
    """Return the frozen open_clip model, and the name to give open_clip.get_tokenizer."""
    name, weights = (f"local-dir:{model}", None) if os.path.isdir(model) else (model, pretrained)
    if weights and not os.path.isfile(weights) and not getproxies():
        # Without a network the hub's client retries for 47 s: ask once, then use its cache or fail.
        host, _, port = huggingface_hub.constants.ENDPOINT.split("/")[2].partition(":")
        try:
            socket.create_connection((host, port or 443), timeout=5).close()
        except OSError:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    logging.disable(logging.CRITICAL)  # pages of log; the one line below says it all
    expected = "weights: give --model FOLDER (open_clip model on disk) or --pretrained FILE"
    with explain(f"--model {model} --pretrained {pretrained}", expected, AssertionError,
                 ImportError, SafetensorError):  # unlike create_model, this has no random weights
        clip, _ = open_clip.create_model_from_pretrained(name, weights, device=device)
    logging.disable(logging.NOTSET)
    return clip.eval(), name


def fit(image, preprocess):
    """Crop or pad, and resize, as open_clip's own transform, at a third of its cost; BGR to RGB."""
    size, shape = np.broadcast_to(preprocess["size"], 2), np.array(image.shape[:2])
    ratio, mode, fill = shape / size, preprocess["resize_mode"], [preprocess["fill_color"]] * 3
    crop = np.rint(size * ratio.min()).astype(int) if mode == "shortest" else shape
    inner = np.rint(shape / ratio.max()).astype(int) if mode == "longest" else size
    top, left = (shape - crop) // 2
    image = image[top : top + crop[0], left : left + crop[1]]
    interpolation = cv2.INTER_AREA if inner.prod() < crop.prod() else cv2.INTER_CUBIC
    image = cv2.resize(image, inner[::-1].tolist(), interpolation=interpolation)
    (top, left), (bottom, right) = (size - inner) // 2, (size - inner + 1) // 2
    return cv2.copyMakeBorder(image, top, bottom, left, right, 0, value=fill)[:, :, ::-1]


def decode(path, segment_seconds, frames_per_segment, preprocess):
    """Yield (segment, RGB frame), those of a segment in time order.

    The last item is (None, (seconds decoded, note)): the note says what is wrong, or nothing.
    A segment is cut into frames_per_segment equal slots, and the first frame of each is taken.
    Grabbing all frames is several times faster than seeking, and exact.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    found, end, note = set(), 0.0, "not a readable file with a UTF-8 name"
    is_readable = (os.path.isfile(path) and os.access(path, os.R_OK)
                   and path.encode(errors="replace") == os.fsencode(path))  # else cv2 crashes
    # nonref: FFmpeg skips frames that no other frame needs, a third of the work. Should a segment
    # lose all its frames by that, the video is read again for it.
    for discard in ("nonref", "default") if is_readable else ():
        os.environ |= {"OPENCV_FFMPEG_CAPTURE_OPTIONS": f"avdiscard;{discard}",
                       "OPENCV_FFMPEG_READ_ATTEMPTS": "1000000000",  # long sound between two frames
                       "OPENCV_FFMPEG_LOGLEVEL": "-8"}  # damaged videos fill the screen
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])  # least CPU
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        # Headers are hints: fps may be 0, -1, nan or 90000, and the count anything.
        step, promised = (1 / fps, count / fps) if 1 <= fps <= 240 else (1 / 25, 0.0)
        now, failures, done, last = -step, 0, set(found), -1
        while failures < 1000:  # one False is a bad packet, not the end
            failures = 0 if capture.grab() else failures + 1
            if failures:
                continue
            stamp = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            now = stamp if now < stamp < float("inf") else now + step  # always forward
            slot = int(now * frames_per_segment / segment_seconds + 1e-6)
            segment, end = slot // frames_per_segment, max(end, now + step)
            image = capture.retrieve()[1] if slot > last and segment not in done else None
            if image is not None:
                last = slot
                found.add(segment)
                yield segment, fit(image, preprocess)
        is_short = end < 0.9 * promised - 1
        if found and len(found) == max(found) + 1 and not is_short:
            break
    if found:
        note = f"kept, with {end:.1f} s of the {promised:.1f} s in its header" if is_short else ""
    elif is_readable:
        note = "no video that OpenCV can read" if os.path.getsize(path) else "empty file"
    yield None, (end, note)


@torch.inference_mode()
def embed(frames, model, preprocess, batch_size):
    """Encode frames, uint8 (height, width, 3) each, into unit-length embeddings (batch_size, D)."""
    # Always a full batch, the last one with filler: an embedding is then the same to the last bit
    # wherever its frame stands.
    batch = np.zeros((batch_size, *frames[0].shape), np.uint8)
    batch[: len(frames)] = frames
    device = model.logit_scale.device
    mean, std = (torch.tensor(preprocess[key], device=device) for key in ("mean", "std"))
    images = (torch.from_numpy(batch).to(device) / 255 - mean) / std  # (B, H, W, 3)
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        embeddings = model.encode_image(images.permute(0, 3, 1, 2)).float().cpu()  # (B, D)
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def extract(folder, videos, model, segment_seconds, frames_per_segment, batch_size):
    """Yield the part of each video: the arrays of the npz, for this video alone, and its note.

    Batches cross the borders of segments and videos; a part comes when its last frame is encoded.
    """
    preprocess = open_clip.get_model_preprocess_cfg(model)
    stream = ((video, *item) for video in videos for item in decode(
        os.path.join(folder, video), segment_seconds, frames_per_segment, preprocess))
    stream, sums = prefetch(stream, 64), {}  # sums: segment -> sum of its frames' embeddings
    while entries := list(islice(stream, batch_size)):
        frames = [item for _, segment, item in entries if segment is not None]
        embedded = iter(embed(frames, model, preprocess, batch_size) if frames else ())
        for video, segment, item in entries:
            if segment is not None:
                sums[segment] = sums.get(segment, 0) + next(embedded)
                continue
            (end, note), segments = item, sorted(sums)
            # Paper: silent. Here: a tail of half a segment or more is a segment, a shorter is none.
            if segments[1:] and end - segments[-1] * segment_seconds < segment_seconds / 2 - 1e-3:
                segments.pop()
            # Paper: one call of a video encoder. Here: the mean over frames, of unit length again.
            rows = [(sums[segment] / sums[segment].norm()).half().numpy() for segment in segments]
            if not np.isfinite(rows).all():
                rows, segments, note = [], [], "the encoder gave zeros or non-finite numbers"
            yield {"embeddings": rows, "lengths": [len(rows)], "videos": [video], "note": note,
                   "starts": np.float32([segment * segment_seconds for segment in segments]),
                   "labels": [os.path.basename(os.path.dirname(video))]}
            sums = {}


def save(path, **arrays):
    """Write an npz beside `path`, then move it there: readers see all of it or nothing."""
    half = Path(f"{path}.{socket.gethostname()}.{os.getpid()}.half")
    try:
        with explain(path, "to write it; the same command goes on from here"):
            half.parent.mkdir(parents=True, exist_ok=True)
            with open(half, "wb") as file:
                np.savez(file, **arrays)
            os.replace(half, path)
    finally:
        if half.exists():
            half.unlink()


def main(args):
    """Extract this process's share of the videos; the last process to finish writes the npz."""
    is_right = args.frames > 0 and 0 < args.segment_seconds < float("inf")
    require(is_right and not os.path.isdir(args.out),
            "expected --frames and --segment-seconds above 0, and a file as out")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names hold anything
    videos = find_videos(args.videos)
    require(videos, f"{args.videos}: no videos there, that is, no {' '.join(VIDEO_ENDINGS)}")
    device = pick_device(args.device)
    model, _ = load_encoder(args.model, args.pretrained, device)
    names = args.model, "" if os.path.isdir(args.model) else args.pretrained
    names = [os.path.abspath(name) if os.path.exists(name) else name for name in names]
    meta = {"format": 1, "model": names[0], "pretrained": names[1],
            "segment_seconds": args.segment_seconds, "frames_per_segment": args.frames}

    # The name of a part is a digest of the video's file, the settings and the encoder.
    common = hashlib.sha256(json.dumps([meta, open_clip.get_model_preprocess_cfg(model)]).encode())
    for tensor in model.visual.state_dict().values():
        common.update(tensor.cpu().numpy().tobytes())
    folder, paths = f"{args.out}.parts", {}
    for video in videos:
        path, digest = os.path.join(args.videos, video), common.copy()
        state = os.path.isfile(path) and [os.path.getsize(path), os.path.getmtime(path)]
        digest.update(json.dumps([video, state]).encode())
        paths[video] = f"{folder}/{digest.hexdigest()[:24]}.npz"
    mine = videos[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    todo = [video for video in mine if not os.path.exists(paths[video])]

    n_segments, batch_size = 0, args.batch_size or (16 if device.type == "cpu" else 256)
    parts = extract(args.videos, todo, model, args.segment_seconds, args.frames, batch_size)
    begin = time.time()
    with tqdm(total=len(mine), initial=len(mine) - len(todo), unit="video", mininterval=1) as bar:
        for part in parts:
            save(paths[part["videos"][0]], **part)
            n_segments += len(part["starts"])
            speed = n_segments / (time.time() - begin)
            bar.set_postfix_str(f"{speed:.1f} segments/s", refresh=False)
            bar.update()

    try:
        parts = [dict(np.load(path)) for path in paths.values()]
    except FileNotFoundError:
        print(f"Other processes are not done; the last one writes {args.out}. If none is left, "
              "give the command again.")
        return
    good = [part for part in parts if len(part["starts"])]
    notes = [f"  {part['videos'][0]}: {part['note']}" for part in parts if part["note"]]
    if good:
        save(args.out, meta=json.dumps(meta), **{
            key: np.concatenate([part[key] for part in good]) for key in good[0] if key != "note"})
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(good)} of {len(videos)} videos, {sum(len(part['starts']) for part in good):,} "
          f"segments; {len(videos) - len(good)} failed" + ":" * bool(notes), *notes, sep="\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
