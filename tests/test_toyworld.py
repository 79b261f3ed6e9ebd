"""The main job end to end: the commands of README.md, on a small toy world."""

import csv
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toyworld

from model import load_data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder that README.md's first command makes, small, and what it printed."""
    toy = tmp_path_factory.mktemp("world") / "a toy"  # with a space in its name
    script = str(ROOT / "tests/toyworld.py")
    command = [sys.executable, script, str(toy), "--small", "--run"]
    done = subprocess.run(command, cwd=toy.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return toy, done.stdout


def blocks(heading):
    """The code blocks of one section of README.md."""
    section = README.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(r"^```\n(.*?)^```", section, re.S | re.M)


def forms(text):
    """The lines of a text, whatever the numbers and the spaces between them are."""
    lines = re.sub(r"[\d.,]+(e-\d+)?", "1", text).splitlines()
    return {" ".join(line.split()) for line in lines}


def test_the_whole_method_runs(world):
    """Catches scripts that do not fit each other: flags, formats, names in the JSON."""
    toy, printed = world
    commands = re.findall(r"^\$ python (\w+)\.py", printed, re.M)
    assert commands == ["extract", "train", "probe", "retrieve"]
    assert "24 of 24 videos" in printed
    assert printed.splitlines()[-1].startswith("the whole took")

    # The captions that were drawn and the segments that were extracted are the same.
    data = load_data(str(toy / "out.npz"))
    with open(toy / "captions.csv", newline="") as file:
        rows = csv.DictReader(file)
        drawn = {(row["video"], float(row["start"])) for row in rows}
    found = set()
    for video, starts in zip(data.videos, data.starts, strict=True):
        found |= {(video, start) for start in starts.tolist()}
    assert drawn == found
    assert set(data.labels) == {f"{pair}{half}" for pair in "1234" for half in "ab"}

    ranks = json.loads((toy / "retrieve.json").read_text())
    assert ranks["chance"]["R@1"] < ranks["true"]["R@1"]
    assert json.loads((toy / "probe.json").read_text())["classes"] == 8


def test_nothing_of_a_test_video_is_trained_on(world):
    """Catches test videos, or segments of them, among the spliced sequences."""
    toy, printed = world
    with open(toy / "labels.csv", newline="") as file:
        split = {row["video"]: row["split"] for row in csv.DictReader(file)}
    data = load_data(str(toy / "out.npz"))
    tested = {name for name in data.videos if split[name] == "test"}
    test = load_data(str(toy / "test.npz"))
    assert set(test.videos) == tested and 0 < len(tested) < len(data.videos)

    rows = {True: set(), False: set()}
    for name, video in zip(data.videos, data.embeddings, strict=True):
        rows[name in tested] |= {row.numpy().tobytes() for row in video}
    spliced = load_data(str(toy / "unlabelled.npz"))
    used = {row.numpy().tobytes() for video in spliced.embeddings for row in video}
    assert used <= rows[False] and not used & rows[True]
    assert "0 of 8 test videos were in the pre-training" in printed


def test_spliced_sequences_tell_stories(world):
    """Catches sequences that are no recipe: a place that changes, other captions."""
    toy, _ = world
    data, captions, _ = toyworld.read_world(toy)
    caption_of = {}
    for row, caption in zip(data["embeddings"], captions, strict=True):
        caption_of[row.tobytes()] = caption
    for video in load_data(str(toy / "unlabelled.npz")).embeddings:
        story = [caption_of[row.numpy().tobytes()] for row in video]
        places = {" ".join(caption.split()[3:]) for caption in story}
        assert len(places) == 1 and 12 <= len(story) <= 40


def test_output_blocks_have_the_form_of_the_output(world):
    """Catches tables in README.md that the scripts no longer print."""
    _, printed = world
    ends_with = blocks("## See it work")[1]
    assert len(forms(ends_with)) > 8
    assert forms(ends_with) <= forms(printed)
    log = blocks("## Is my loss normal?")[0]
    assert forms(log) <= forms(printed)


def test_short_commands_chain(world, monkeypatch, capsys):
    """Catches defaults that no longer name the file which the stage before wrote."""
    toy, _ = world
    monkeypatch.chdir(toy)
    for name in ("out.npz", "lvmae.pt", "lvmae.jsonl"):
        (toy / name).unlink()
    short = {
        "extract": "--model clip",
        "train": "--epochs 1",
        "probe": "--runs 1",
        "retrieve": "",
    }
    block = blocks("## Your own videos")[0]
    commands = re.findall(r"^python (\w+)\.py ([^#\n]*)", block, re.M)
    assert [script for script, _ in commands] == list(short)
    for script, flags in commands:
        stage = importlib.import_module(script)
        if script == "probe":  # two videos of a recipe are too few for three splits
            flags += " --labels labels.csv"
        stage.main(stage.get_args(shlex.split(f"{flags} {short[script]}")))
    assert "LV-MAE attentive" in capsys.readouterr().out


def test_a_folder_that_is_not_ours_is_refused(tmp_path):
    """Catches a toy world that is made over somebody's files."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "mine.mp4").write_text("mine")
    with pytest.raises(SystemExit, match="expected a new folder or a toy world"):
        toyworld.clear(tmp_path, 0)
    assert (tmp_path / "videos" / "mine.mp4").read_text() == "mine"


def test_a_smaller_world_over_a_larger_one(tmp_path):
    """Catches videos of an earlier, larger world that stay in the new one."""
    toyworld.clear(tmp_path / "toy", 0)
    (tmp_path / "toy" / "videos" / "1a").mkdir(parents=True)
    (tmp_path / "toy" / "videos" / "1a" / "999.mp4").touch()
    (tmp_path / "toy" / "notes.txt").write_text("mine")
    toyworld.clear(tmp_path / "toy", 0)
    assert not (tmp_path / "toy" / "videos").exists()
    assert (tmp_path / "toy" / "notes.txt").read_text() == "mine"


def test_pairs_differ_in_order_alone():
    """Catches a world whose recipes the bag of segments can tell apart."""
    recipes = toyworld.make_recipes(np.random.default_rng(0))
    for pair in "1234":
        one = recipes[f"{pair}a"]
        other = recipes[f"{pair}b"]
        assert sorted(one) == sorted(other) and one != other
    used = [step for name in recipes if name.endswith("a") for step in recipes[name]]
    assert sorted(used) == sorted(toyworld.OBJECTS)
