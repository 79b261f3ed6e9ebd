"""Stage 1 of LV-MAE: cut every video of a folder into 5-second segments, embed each.

Section 3.1: a video is N consecutive segments of frames, and a frozen encoder turns
each segment into one embedding. Here the encoder is the image tower of an open_clip
model, and a segment is the mean over its frames:

    video     |5 s|5 s|5 s|5 s|3 s|    the first frame of each of 8 equal slots
                |   |   |   |   |
    out.npz    (D) (D) (D) (D) (D)     embeddings (S, D) of all videos, unit length

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
from itertools import groupby

# The libraries read these when they are imported.
# Between two frames there may be sound for long.
os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", "1000000000")
# FFmpeg's complaints about damaged videos would fill the screen.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# Threads of PyTorch that wait must not take the decoder's core.
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

ENDINGS = (".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov")
ENDINGS += (".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm")
ENDINGS += (".wmv",)

# ---- Segments of a video (section 3.1) -------------------------------------------------


def decode(path, segment_seconds, frames_per_segment):
    """Section 3.1: yield (segment, slot, frame) of a video, in time order, from 0.

    A segment is cut into frames_per_segment equal slots, and the first frame of each is
    taken: RGB, uint8 (height, width, 3). A slot without a frame is left out. The last
    segment may be a short piece. Raises BadVideo.
    """
    reader = VideoReader(path)
    yield from sample_frames(reader, segment_seconds, frames_per_segment)


def sample_frames(reader, segment_seconds, frames_per_segment):
    """Do what decode does, for a video that is open already."""
    slot_seconds = segment_seconds / frames_per_segment
    last_slot = -1
    # Grabbing all frames is several times faster than seeking, and exact.
    while reader.grab():
        # 1e-6: a frame that is due at 5 s may be stamped 4.9999999.
        slot = int(reader.begin / slot_seconds + 1e-6)  # from the start of the video
        if slot > last_slot:
            is_good, frame = reader.capture.retrieve()
            if is_good:  # else the next frame of the slot is tried
                last_slot = slot
                frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                yield slot // frames_per_segment, slot % frames_per_segment, frame

    if last_slot < 0:
        raise BadVideo(
            f"no frame that OpenCV can decode, codec {reader.codec} (it has no AV1); "
            "convert it: ffmpeg -i VIDEO -c:v libx264 NEW.mp4"
        )


def embed_video(reader, clip, preprocess, segment_seconds, frames_per_segment):
    """Section 3.1: embed a video -> embeddings (n, D) of unit length, starts (n,).

    Raises BadVideo.
    """
    size = max(clip.visual.image_size)
    frames = sample_frames(reader, segment_seconds, frames_per_segment)
    embeddings = []
    starts = []
    for segment, images in prefetch(batches(frames, preprocess, size)):
        # Paper: a video encoder. Here: the mean over frames, made unit length below.
        embeddings.append(encode_images(images, clip).mean(dim=0))  # (D)
        starts.append(segment * segment_seconds)

    # Paper: silent on the tail. Here: half a segment or more is one, and the first may
    # be shorter. All frames have been read by now, so reader.end is that of the video.
    if len(starts) > 1 and reader.end < starts[-1] + segment_seconds / 2 - 1e-3:
        embeddings.pop()
        starts.pop()

    embeddings = F.normalize(torch.stack(embeddings), dim=1)  # (n, D)
    is_unit = (embeddings.norm(dim=1) - 1).abs() < 1e-3  # (n,), not where it is NaN
    if not is_unit.all():
        raise BadVideo("the encoder gave zeros or non-finite numbers")
    return embeddings, torch.tensor(starts)


@torch.inference_mode()
def encode_images(images, clip):
    """Encode images (f, 3, H, W) -> embeddings (f, D) of unit length, on the CPU."""
    device = clip.logit_scale.device
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        embeddings = clip.encode_image(images.to(device))
    return F.normalize(embeddings.float(), dim=1).cpu()


def batches(frames, preprocess, size):
    """Yield segment, images (f, 3, H, W) for each segment of what decode yields."""
    try:
        for segment, items in groupby(frames, key=lambda item: item[0]):
            images = []
            for _, _, frame in items:
                image = Image.fromarray(shrink(frame, size))
                images.append(preprocess(image))  # (3, H, W)
            yield segment, torch.stack(images)
    except BadVideo:
        raise
    except Exception as error:  # whatever else a file does to the libraries
        raise BadVideo(f"{error!r:.200}") from error


def shrink(frame, size):
    """Resize a frame so that its shorter side is `size`, unless it is smaller."""
    # Pillow alone, from full size, takes twice as long, as much as half the decoding.
    scale = size / min(frame.shape[:2])
    if scale >= 1:
        return frame
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def prefetch(items):
    """Yield items; a thread works out the next one while the last one is used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(next, items)
        while True:
            try:
                item = future.result()
            except StopIteration:
                return
            future = thread.submit(next, items)
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


class VideoReader:
    """A video that OpenCV reads, one frame after the other. Raises BadVideo."""

    def __init__(self, path):
        path = os.path.abspath(path)  # of a relative a:b.mp4, a would be a protocol
        if not os.path.isfile(path):  # a pipe would wait for ever
            raise BadVideo("no regular file")
        if os.path.getsize(path) == 0:
            raise BadVideo("empty file")
        if os.fsencode(path).decode(errors="replace") != path:
            raise BadVideo("its name is not UTF-8, and OpenCV opens no other")

        # FFmpeg may skip frames that no other frame needs, a third of its work. Not where
        # frames are few, nor where they have no times and are counted instead.
        skipping = "avdiscard;nonref"
        self.open(path, skipping)
        self.capture.grab()
        has_times = self.capture.grab() and self.capture.get(cv2.CAP_PROP_POS_MSEC) > 0
        is_dense = 20 <= self.capture.get(cv2.CAP_PROP_FPS) <= 240
        if not (has_times and is_dense):
            skipping = ""
        self.open(path, skipping)

        code = int(self.capture.get(cv2.CAP_PROP_FOURCC))
        self.codec = code.to_bytes(8, "little", signed=True)[:4]

        # Headers are hints: a frame rate of 0, -1, nan or 90000 is found there.
        self.fps = 25.0
        self.promised = 0.0  # seconds
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        if 0.1 <= fps <= 240:
            self.fps = fps
            self.promised = self.capture.get(cv2.CAP_PROP_FRAME_COUNT) / fps

        # Seconds at which the frame of the last grab begins and ends.
        self.begin = -1 / self.fps  # so that a first stamp of 0 is later
        self.end = 0.0

    def open(self, path, options):
        """Open the file at its beginning; OpenCV reads FFmpeg's options off here."""
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = options
        one_thread = [cv2.CAP_PROP_N_THREADS, 1]  # least CPU time
        self.capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, one_thread)
        if not self.capture.isOpened():
            raise BadVideo("no video that OpenCV can read")

    def grab(self):
        """Go to the next frame, which capture.retrieve() then gives; False: no more."""
        for _ in range(1000):  # one failure is a bad packet, not the end
            if self.capture.grab():
                stamp = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if self.begin < stamp < float("inf"):
                    self.begin = stamp
                else:  # time never goes back
                    self.begin += 1 / self.fps
                self.end = self.begin + 1 / self.fps
                return True
        return False


# ---- Parts: a file for each finished video, so that a stopped run can go on ------------

ARRAYS = ("embeddings", "lengths", "videos", "starts", "labels")  # of the npz


def check_settings(folder, settings):
    """Make the folder of parts, or see that the parts in it were made with `settings`."""
    path = os.path.join(folder, "settings.json")
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(path):
            with replacing(path) as file:
                file.write(json.dumps(settings).encode())
        with open(path) as file:
            found = json.load(file)
    except OSError as error:
        raise SystemExit(
            f"{path}: found {error}, expected to read or write it"
        ) from None
    except ValueError:  # cut, by a power failure
        found = {}
    for key, value in settings.items():
        message = f"{path}: found {key} {found.get(key)}, expected {value}"
        advice = "delete the folder, or take another name for the npz"
        require(found.get(key) == value, f"{message}: {advice}")


def weights_on_disk(args):
    """Size and time of weights that are files, so that other weights are noticed."""
    files = [args.pretrained]
    if os.path.isdir(args.model):
        files = sorted(os.scandir(args.model), key=lambda file: file.name)
    states = []
    for file in files:
        if os.path.isfile(file):
            stat = os.stat(file)
            states.append([stat.st_size, stat.st_mtime_ns])
    return states


def part_path(folder, video):
    """Path of the part of a video."""
    digest = hashlib.sha256(os.fsencode(video)).hexdigest()
    return os.path.join(folder, f"{digest[:16]}.npz")


def fingerprint(path, video):
    """Say which state of which video a part was made from."""
    if not os.path.exists(path):
        return f"{video}, gone"
    stat = os.stat(path)
    return f"{video}, {stat.st_size} bytes, changed at {stat.st_mtime_ns}"


def read_part(folder, path, video):
    """Read the result for the video at `path`, or None where it is yet to be made."""
    try:
        with np.load(part_path(folder, video), allow_pickle=False) as file:
            # All of it: reading compares the checksums.
            result = {key: file[key] for key in (*ARRAYS, "source", "note")}
        if result["source"] == fingerprint(path, video):
            return result
        tqdm.write(f"{video}: changed, embedded anew")
    except FileNotFoundError:
        pass
    except Exception as error:
        tqdm.write(f"{video}: damaged part, embedded anew: {error!r:.100}")
    return None


def make_result(path, video, clip, preprocess, args):
    """Embed a video -> what its part holds: the npz of it alone, its source, a note."""
    source = fingerprint(path, video)
    note = ""
    try:
        reader = VideoReader(path)
        embeddings, starts = embed_video(
            reader, clip, preprocess, args.segment_seconds, args.frames
        )
        span = (starts[-1] - starts[0]).item() / args.segment_seconds
        n_gaps = round(span) + 1 - len(starts)
        if reader.end < 0.9 * reader.promised:
            note = f"kept, with {reader.end:.1f} s"
            note += f" of the {reader.promised:.1f} s in its header"
        elif n_gaps > 0:
            note = f"kept, without {n_gaps} segments in which no frame begins"
    except BadVideo as error:
        embeddings = torch.empty(0, 0)
        starts = torch.empty(0)
        note = str(error)

    return {
        "embeddings": embeddings.half().numpy(),
        "lengths": [len(starts)],
        "videos": [video],
        "starts": starts.float().numpy(),
        "labels": [os.path.basename(os.path.dirname(video))],
        "source": source,
        "note": note,
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
    add = parser.add_argument
    add("videos", help="folder of videos, searched with its subfolders")
    add("out", help="npz file to write")

    add("--model", default="ViT-B-32", help="open_clip name, or folder")
    add(
        "--pretrained",
        default="datacomp_xl_s13b_b90k",
        help="weights of a named model: open_clip's tag, or a file",
    )

    add("--segment-seconds", type=number(float, 0.01), default=5.0, help="of a segment")
    add("--frames", type=number(int, 1), default=8, help="per segment")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args):
    """Embed this process's share of the videos; the last one to finish writes `out`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files hold anything
    rank, world = read_rank()

    # Find the videos.
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

    if rank == 0 and os.path.exists(args.out):
        print(f"{args.out}: there already, and will be replaced")

    # Embed one video after the other; each result goes into a part.
    device = pick_device(args.device)
    clip, preprocess = load_encoder(args.model, args.pretrained, device)
    folder = f"{args.out}.parts"
    check_settings(folder, {**meta, "weights": weights_on_disk(args)})
    for i in tqdm(range(rank, len(videos), world), unit="video"):
        if read_part(folder, paths[i], videos[i]) is None:
            result = make_result(paths[i], videos[i], clip, preprocess, args)
            with replacing(part_path(folder, videos[i])) as file:
                np.savez(file, **result)

    # Join the parts of all processes.
    results = []
    for path, video in zip(paths, videos, strict=True):
        result = read_part(folder, path, video)
        if result is None:
            print(f"Parts are missing: others make them, or have written {args.out}.")
            print("If nobody does, and it is not there, give the command again.")
            return
        results.append(result)
    good = [result for result in results if len(result["starts"]) > 0]
    if good:
        arrays = {}
        for key in ARRAYS:
            arrays[key] = np.concatenate([result[key] for result in good])
        with replacing(args.out) as file:
            np.savez(file, **arrays, meta=json.dumps(meta))
    remove_parts(folder, videos)

    # Report.
    n_segments = sum(len(result["starts"]) for result in good)
    print(f"{len(good)} of {len(videos)} videos, {n_segments:,} segments;", end=" ")
    print(f"{len(videos) - len(good)} failed")
    for video, result in zip(videos, results, strict=True):
        if result["note"]:
            print(f"  {video}: {result['note']}")
    require(good, f"{args.out}: not written, for there is no segment")


if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
