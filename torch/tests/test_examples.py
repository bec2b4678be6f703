"""The examples of the README run."""

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("example", sorted(path.name for path in FOLDER.glob("*.py")))
def test_example(example):
    if example == "huggingface.py":
        pytest.importorskip("transformers")
    subprocess.run([sys.executable, FOLDER / example], check=True)
