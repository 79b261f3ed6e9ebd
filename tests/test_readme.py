"""What README.md says is run or looked up here, so that it cannot drift from the code."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from model import load_data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "tests/README.md").read_text()
SCRIPTS = ("extract", "train", "probe", "retrieve")


def find(name):
    """The function or class that README.md calls model.LVMAE.encode."""
    script, *path = name.split(".")
    thing = importlib.import_module(script)
    for part in path:
        thing = getattr(thing, part)
    return thing


def test_map_from_paper_to_code():
    """Catches a function in README.md that is gone, or is not what the paper's tag says."""
    rows = re.findall(r"^\| ([^|]+?) \| `([\w.]+)` \|", README, re.M)
    assert len(rows) > 12
    for tags, name in rows:
        source = inspect.getsource(find(name))
        for tag in re.findall(
            r"Eq\. \(\d\)|(?:Table|Figure|[Ss]ection) \d(?:\.\d)?", tags
        ):
            assert tag.lower() in source.lower(), f"{name}: {tag}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    """Catches a --help that fails, or a flag without a word of help."""
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout
    for flag in re.findall(r"^  (--[\w-]+)", text, re.M):
        entry = re.search(rf"^  {flag}\b(.*(?:\n {{10,}}.*)*)", text, re.M)[1]
        words = re.sub(r"[A-Z_\[\]{},.|]|\(default.*", "", entry).split()
        assert len(words) >= 2, f"{script}.py {flag}"


def test_every_command_is_understood():
    """Catches commands in README.md and in docstrings with flags that are gone."""
    texts = [README, RESULTS]
    texts += [importlib.import_module(script).__doc__ for script in SCRIPTS]
    text = "\n".join(texts).replace("\\\n", "")  # continued lines as one
    commands = re.findall(r"(?:python|\d) (\w+)\.py (.*?)(?:#.*|`.*)?$", text, re.M)
    assert {script for script, _ in commands} >= set(SCRIPTS)
    for script, arguments in commands:
        if script in SCRIPTS and "..." not in arguments and "$" not in arguments:
            importlib.import_module(script).get_args(shlex.split(arguments))


def test_continuous_integration_runs_these_lines():
    """Catches a README.md whose install and test line is not the one that is tested."""
    line = "pip install -r requirements.txt && python -m pytest"
    assert f"\n{line}\n" in README
    assert line in (ROOT / ".ci/run").read_text()


def test_pictures_are_there():
    """Catches a picture that README.md shows and nobody committed."""
    for text, folder in ((README, ROOT), (RESULTS, ROOT / "tests")):
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert (folder / path).is_file(), path


def test_size():
    """Catches a front page that has grown too long to be read."""
    assert len(README.encode()) < 14_000


def snippets(text=README):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_example_of_own_embeddings(tmp_path, monkeypatch):
    """Catches an example that writes what load_data refuses."""
    monkeypatch.chdir(tmp_path)
    exec(snippets()[0], {})
    data = load_data("out.npz")
    assert [len(video) for video in data.embeddings] == [30, 12]
    assert data.videos == ["a.mp4", "b.mp4"]


def test_example_of_languagebind(tmp_path, monkeypatch):
    """Catches segments in the order of their names, and names without their ending."""
    monkeypatch.chdir(tmp_path)
    for video, n in (("one.mp4", 13), ("two.mkv", 3)):
        for i in range(n):
            folder = tmp_path / "langbind" / video / f"{5 * i}-{5 * i + 5}"
            folder.mkdir(parents=True)
            embedding = torch.eye(16)[i][None] * 3
            part = {"embedding": embedding, "start": 5 * i, "end": 5 * i + 5}
            torch.save(part, folder / "langbind_output.pt")
    exec(snippets(RESULTS)[0], {})
    data = load_data("out.npz")
    assert data.videos == ["one.mp4", "two.mkv"]
    assert [len(video) for video in data.embeddings] == [13, 3]
    assert data.starts[0].tolist() == [5.0 * i for i in range(13)]
    assert np.array_equal(data.embeddings[0], np.eye(16)[:13])
    assert data.meta["model"] == "LanguageBind"


def test_example_of_captions(tmp_path, monkeypatch):
    """Catches an example whose captions are not those of the segments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter("videos/a.mp4", fourcc, 4, (64, 48))
    for i in range(60):
        writer.write(np.full((48, 64, 3), 60 * (1 + i // 20), np.uint8))
    writer.release()
    np.savez("out.npz", embeddings=np.eye(3, 8), lengths=[3], videos=["a.mp4"])
    exec(snippets()[1], {})
    captions = Path("captions.csv").read_text().splitlines()
    assert captions[0] == "video,start,caption" and len(captions) == 4
    for i, line in enumerate(captions[1:]):
        assert line.startswith(f"a.mp4,{5.0 * i},")
        brightness = float(re.findall(r"[\d.]+", line)[-1])
        assert abs(brightness - 60 * (i + 1)) < 15, line
