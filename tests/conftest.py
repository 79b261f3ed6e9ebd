"""Lets the tests import the five scripts, one folder up, and toyworld, beside this file."""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent),
]
