"""The main job end to end: the command of README.md's first screen, in its small size."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import toyworld

from model import load_data

ROOT = Path(__file__).resolve().parent.parent


def test_the_whole_method_runs(tmp_path):
    """Catches scripts that do not fit each other: flags, file formats, names in the JSON files."""
    toy = tmp_path / "toy"
    command = [sys.executable, str(ROOT / "tests/toyworld.py"), str(toy), "--small", "--run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout
    commands = re.findall(r"^\$ python (\w+)\.py", printed, re.M)
    assert commands == ["extract", "train", "probe", "retrieve"]
    assert "24 of 24 videos" in printed and printed.splitlines()[-1].startswith("the whole took")

    # The captions that were drawn and the segments that were extracted are the same ones.
    data = load_data(str(toy / "out.npz"))
    with open(toy / "captions.csv", newline="") as file:
        drawn = {(row["video"], float(row["start"])) for row in csv.DictReader(file)}
    names = np.repeat(data.videos, data.lengths)
    assert drawn == set(zip(names.tolist(), data.starts.tolist(), strict=True))
    assert set(data.labels) == {f"{pair}{half}" for pair in "1234" for half in "ab"}

    ranks = json.loads((toy / "retrieve.json").read_text())
    assert ranks["chance"]["R@1"] < ranks["true"]["R@1"]
    assert json.loads((toy / "probe.json").read_text())["classes"] == 8


def test_pairs_differ_in_order_alone():
    """Catches a world whose recipes the bag of segments can tell apart."""
    recipes = toyworld.make_recipes(np.random.default_rng(0))
    for pair in "1234":
        one, other = recipes[f"{pair}a"], recipes[f"{pair}b"]
        assert sorted(one) == sorted(other) and one != other
    used = [step for name, steps in recipes.items() if name.endswith("a") for step in steps]
    assert sorted(used) == sorted(toyworld.OBJECTS)
