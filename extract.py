"""Stage 1 of LV-MAE: cut every video of a folder into 5-second segments, embed each.

Section 3.1: a video is N consecutive segments of frames, and a frozen encoder turns
each segment into one embedding. Here the encoder is the image tower of an open_clip
model, and a segment is the mean over its frames:

    video     |5 s|5 s|5 s|5 s| 3 s|     8 frames of each: the first of 8 equal slots
                |   |   |   |   |
    out.npz    (D) (D) (D) (D) (D)       embeddings (S, D) of all videos, unit length

    python extract.py videos/ out.npz                   # ViT-B-32, downloaded on first use
    python extract.py videos/ out.npz --model FOLDER    # an open_clip model on disk
    torchrun --nproc-per-node 2 extract.py videos/ out.npz    # two share the videos

It ends with "97 of 100 videos, 4,812 segments; 3 failed" and the reasons of these. If
it is stopped, the same command goes on from there. ViT-B-32 takes about one core second
for a segment of 720p video.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

# Read by the libraries. nonref: FFmpeg skips frames that no other frame needs, a
# third of its work. Attempts: sound may lie for long between two frames. -8: damaged
# videos would fill the screen. Passive: threads that wait must not take the decoder's core.
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "avdiscard;nonref")
os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", "1000000000")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from model import check_outputs, number, pick_device, read_rank, replacing, require

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

BATCH = 16  # frames: the fastest on a CPU, and a GPU waits for the decoder anyway
ENDINGS = (".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov")
ENDINGS += (".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm")
ENDINGS += (".wmv",)

# ---- Segments of a video (section 3.1) -------------------------------------------------


def decode(path, segment_seconds, frames_per_segment):
    """Yield (segment, slot, frame): frames of a video in time order, numbers from 0.

    A segment is cut into frames_per_segment equal slots, and the first frame of each is
    taken: RGB, uint8 (height, width, 3). A slot without a frame is left out. Raises
    BadVideo. Grabbing all frames is several times faster than seeking, and exact.
    """
    slot_seconds = segment_seconds / frames_per_segment
    last_slot = -1
    waiting = []
    for begin, end, capture in grab_frames(path):
        slot = int(begin / slot_seconds + 1e-6)  # counted from the start of the video
        if slot > last_slot:
            is_good, frame = capture.retrieve()
            if is_good:
                last_slot = slot
                segment = slot // frames_per_segment
                frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                waiting.append((segment, slot % frames_per_segment, frame))

        # Paper: silent on the tail. Here: half a segment or more is a segment, less is
        # none. So frames wait until half of theirs is there; the first needs no half.
        while waiting:
            segment = waiting[0][0]
            half = (segment + 0.5) * segment_seconds - 1e-3
            if segment > 0 and end < half:
                break
            yield waiting.pop(0)


def embed_video(path, clip, preprocess, segment_seconds, frames_per_segment):
    """Embed the segments of one video -> embeddings (n, D) unit length, starts (n,).

    Raises BadVideo.
    """
    size = max(clip.visual.image_size)
    frames = decode(path, segment_seconds, frames_per_segment)
    segments = []
    embeddings = []
    for numbers, images in prefetch(batches(frames, preprocess, size)):
        segments += numbers
        embeddings.append(encode(images, clip))  # (b, D)

    # Paper: one call of a video encoder. Here: the mean over frames, made unit length.
    segments, index = torch.tensor(segments).unique(return_inverse=True)  # (n,), (F,)
    embeddings = torch.cat(embeddings)  # (F, D), F frames
    sums = torch.zeros(len(segments), embeddings.shape[1])
    sums.index_add_(0, index, embeddings)  # (n, D)
    embeddings = F.normalize(sums, dim=1)
    is_unit = (embeddings.norm(dim=1) - 1).abs() < 1e-3  # (n,), not where it is NaN
    if not is_unit.all():
        raise BadVideo("the encoder gave zeros or non-finite numbers")
    return embeddings, segments * segment_seconds


@torch.inference_mode()
def encode(images, clip):
    """Encode images (b, 3, H, W) -> embeddings (b, D) of unit length, on the CPU."""
    device = clip.logit_scale.device
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        embeddings = clip.encode_image(images.to(device))
    return F.normalize(embeddings.float(), dim=1).cpu()


def batches(frames, preprocess, size):
    """Batch what decode yields -> lists of b segment numbers, images (b, 3, H, W)."""
    segments = []
    images = []
    for segment, _, frame in frames:
        frame = shrink(frame, size)
        segments.append(segment)
        images.append(preprocess(Image.fromarray(frame)))
        if len(images) == BATCH:
            yield segments, torch.stack(images)
            segments = []
            images = []
    if images:
        yield segments, torch.stack(images)


def shrink(frame, size):
    """Resize a frame so that its shorter side is `size`, unless it is smaller."""
    # Pillow alone, from full size, takes twice as long, as much as half the decoding.
    scale = size / min(frame.shape[:2])
    if scale < 1:
        area = cv2.INTER_AREA
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=area)
    return frame


def prefetch(items):
    """Yield items; a thread works out the next one while the last one is used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(next, items, None)
        while True:
            try:
                item = future.result()
            except BadVideo:
                raise
            except Exception as error:  # whatever else a file does to the libraries
                raise BadVideo(f"{error!r:.200}") from error
            if item is None:
                return
            future = thread.submit(next, items, None)
            yield item


def load_encoder(model, pretrained, device):
    """Load an open_clip model, frozen -> clip, preprocess (of a Pillow image).

    Its tokenizer is open_clip.get_tokenizer(encoder_name(model)).
    """
    logging.disable(logging.CRITICAL)  # of pages of it, the line below says all
    try:
        with warnings.catch_warnings():
            # Weights such as openai's with another activation: wrong embeddings.
            warnings.filterwarnings("error", "QuickGELU mismatch")
            # Without weights this raises; create_model would give random ones.
            clip, preprocess = open_clip.create_model_from_pretrained(
                encoder_name(model), pretrained, device=device
            )
    except Exception as error:
        found = f"--model {model} --pretrained {pretrained}: found {error!r:.300}"
        expected = "weights: give --model FOLDER (open_clip's) or --pretrained FILE"
        raise SystemExit(f"{found}, expected {expected}") from None
    logging.disable(logging.NOTSET)
    return clip.eval(), preprocess


def encoder_name(model):
    """Name by which open_clip knows a model: a folder on disk, or one of its own."""
    if os.path.isdir(model):
        return f"local-dir:{model}"
    return model


# ---- Files of videos, and all that is odd in them --------------------------------------


class BadVideo(Exception):
    """A video cannot be read; the text says why."""


def find_videos(root):
    """List the videos below `root`, sorted, as paths relative to it, with '/'."""
    videos = []
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=print):
        subfolders.sort()
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above would make a loop
            subfolders.clear()
            continue
        visited.add(real)
        for file in files:
            if file.lower().endswith(ENDINGS):
                path = os.path.relpath(os.path.join(folder, file), root)
                videos.append(path.replace(os.sep, "/"))
    return sorted(videos)


def open_video(path):
    """Open a video in OpenCV; raises BadVideo."""
    path = os.path.abspath(path)  # of a relative a:b.mp4, a would be a protocol
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise BadVideo("no regular file")
    if os.path.getsize(path) == 0:
        raise BadVideo("empty file")
    if os.fsencode(path).decode(errors="replace") != path:
        raise BadVideo("its name is not UTF-8, and OpenCV opens no other")
    one_thread = [cv2.CAP_PROP_N_THREADS, 1]  # least CPU time
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, one_thread)
    if not capture.isOpened():
        raise BadVideo("no video that OpenCV can read")
    return capture


def grab_frames(path):
    """Yield (begin, end, capture) for each frame: seconds that never go back.

    capture.retrieve() then gives the frame. Raises BadVideo.
    """
    capture = open_video(path)
    fps = capture.get(cv2.CAP_PROP_FPS)
    if not 1 <= fps <= 240:  # headers are hints: 0, -1, nan and 90000 are found there
        fps = 25
    begin = -1 / fps
    failures = 0
    while failures < 1000:  # one failure is a bad packet, not the end
        if not capture.grab():
            failures += 1
            continue
        failures = 0
        stamp = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if begin < stamp < float("inf"):
            begin = stamp
        else:
            begin += 1 / fps
        yield begin, begin + 1 / fps, capture

    if begin < 0:
        codec = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(8, "little", signed=True)
        raise BadVideo(
            f"no frame that OpenCV can decode, codec {codec[:4]} (it has no AV1); "
            "convert it: ffmpeg -i VIDEO -c:v libx264 NEW.mp4"
        )


def header_seconds(path):
    """Length that the header of a video promises, in seconds; 0 where it says none."""
    capture = open_video(path)
    fps = capture.get(cv2.CAP_PROP_FPS)
    if fps > 0:
        return capture.get(cv2.CAP_PROP_FRAME_COUNT) / fps
    return 0.0


# ---- Parts: a file for each finished video, so that a stopped run can go on ------------


def check_settings(folder, meta):
    """Make the folder of parts, or see that the parts in it were made as `meta` says."""
    path = os.path.join(folder, "settings.json")
    settings = json.dumps(meta, indent=0)  # a line for each
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(path):
        with replacing(path) as file:
            file.write(settings.encode())
    with open(path, errors="replace") as file:
        found = set(file.read().split("\n"))
    expected = set(settings.split("\n"))
    message = f"{path}: found {found - expected}, expected {expected - found}"
    advice = "delete the folder, or take another name for the npz"
    require(found == expected, f"{message}: {advice}")


def part_path(folder, video):
    """Path of the part of a video."""
    digest = hashlib.sha256(os.fsencode(video)).hexdigest()
    return os.path.join(folder, f"{digest[:16]}.npz")


def describe(path, video):
    """Say which state of which video a part belongs to."""
    if not os.path.exists(path):
        return f"{video}, gone"
    stat = os.stat(path)
    return f"{video}, {stat.st_size} bytes, changed at {stat.st_mtime_ns}"


def read_part(folder, path, video):
    """Read the part of the video at `path`, or None where it is yet to be made."""
    try:
        with np.load(part_path(folder, video), allow_pickle=False) as file:
            part = dict(file)  # all of it: reading compares the checksums
        if part["source"] == describe(path, video):
            return part
        tqdm.write(f"{video}: changed, embedded anew")
    except FileNotFoundError:
        pass
    except Exception as error:
        tqdm.write(f"{video}: damaged part, embedded anew: {error!r:.100}")
    return None


def make_part(path, video, clip, preprocess, args):
    """Embed a video -> its part: what the npz holds, of it alone, and a note."""
    source = describe(path, video)
    seconds = args.segment_seconds
    note = ""
    try:
        embeddings, starts = embed_video(path, clip, preprocess, seconds, args.frames)
        found = starts[-1].item() + seconds
        promised = header_seconds(path)
        if found + seconds / 2 < 0.9 * promised:
            note = f"kept, with {found:.1f} s of the {promised:.1f} s in its header"
    except BadVideo as error:
        embeddings = torch.empty(0, 0)
        starts = torch.empty(0)
        note = str(error)

    return {
        "source": source,
        "note": note,
        "embeddings": embeddings.half().numpy(),
        "lengths": [len(starts)],
        "videos": [video],
        "starts": starts.float().numpy(),
        "labels": [os.path.basename(os.path.dirname(video))],
    }


def remove_parts(folder, videos):
    """Remove the parts of these videos, and the folder unless other things are in it."""
    ours = {os.path.basename(part_path(folder, video)) for video in videos}
    with suppress(FileNotFoundError):  # another process removes them too
        for file in os.listdir(folder):
            if file[:20] in ours:  # with what a killed run left, X.npz.1.tmp
                os.remove(os.path.join(folder, file))
        if os.listdir(folder) == ["settings.json"]:
            os.remove(os.path.join(folder, "settings.json"))
            os.rmdir(folder)


# ---- Command line ----------------------------------------------------------------------


def get_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("videos", help="folder of videos, searched with its subfolders")
    parser.add_argument("out", help="npz file to write")

    parser.add_argument("--model", default="ViT-B-32", help="open_clip name, or folder")
    parser.add_argument(
        "--pretrained",
        default="datacomp_xl_s13b_b90k",
        help="weights of a named model: open_clip's tag, or a file (its images are "
        "normalised as OpenAI's; a folder knows its own way)",
    )

    parser.add_argument(
        "--segment-seconds", type=number(float, 0.01), default=5.0, help="of a segment"
    )
    parser.add_argument(
        "--frames", type=number(int, 1), default=8, help="per segment, evenly spaced"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args):
    """Embed this process's share of the videos; the last one to finish writes `out`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files hold anything
    rank, world = read_rank()

    # Find the videos, and what is done of them.
    videos = find_videos(args.videos)
    require(videos, f"{args.videos}: no videos there, that is, {' '.join(ENDINGS)}")
    paths = [os.path.join(args.videos, video) for video in videos]
    check_outputs({args.out: ".npz"}, paths)
    meta = {
        "model": args.model,
        "pretrained": args.pretrained,
        "segment_seconds": args.segment_seconds,
        "frames_per_segment": args.frames,
    }
    if os.path.isdir(args.model):
        meta["model"] = os.path.abspath(args.model)
        meta["pretrained"] = ""

    # Embed one video after the other, each into a part.
    device = pick_device(args.device)
    clip, preprocess = load_encoder(args.model, args.pretrained, device)
    folder = f"{args.out}.parts"
    check_settings(folder, meta)
    for i in tqdm(range(rank, len(videos), world), unit="video"):
        if read_part(folder, paths[i], videos[i]) is None:
            part = make_part(paths[i], videos[i], clip, preprocess, args)
            with replacing(part_path(folder, videos[i])) as file:
                np.savez(file, **part)

    # Join the parts of all processes.
    parts = []
    for path, video in zip(paths, videos, strict=True):
        part = read_part(folder, path, video)
        if part is None:
            print(f"Other processes are not done; the last one writes {args.out}.")
            print("If none is left, give the command again.")
            return
        parts.append(part)
    good = [part for part in parts if len(part["starts"])]
    arrays = {}
    if good:
        for key in ("embeddings", "lengths", "videos", "starts", "labels"):
            arrays[key] = np.concatenate([part[key] for part in good])
        with replacing(args.out) as file:
            np.savez(file, **arrays, meta=json.dumps(meta))
    remove_parts(folder, videos)

    # Report.
    n_segments = sum(len(part["starts"]) for part in good)
    print(f"{len(good)} of {len(videos)} videos, {n_segments:,} segments;", end=" ")
    print(f"{len(videos) - len(good)} failed")
    for part in parts:
        if part["note"]:
            print(f"  {part['videos'][0]}: {part['note']}")
    require(good, f"{args.out}: not written, for there is no segment")


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
