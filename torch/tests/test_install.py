"""What was built, and what it says where something is missing."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import cumoe

FOLDER = pathlib.Path(cumoe.__file__).parent


def needed(library):
    lines = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}


def test_no_cuda_library_is_needed():
    operators = next(FOLDER.glob("_ops*.so"))
    assert operators.name == "_ops.abi3.so"
    libraries = {"libcumoe.so.0.1", "libtorch.so", "libtorch_cpu.so", "libc10.so"}
    assert libraries <= needed(operators)
    allowed = ("libstdc++.so", "libgcc_s.so", "libc.so", "libm.so", "ld-linux")
    assert all(name in libraries or name.startswith(allowed) for name in needed(operators))
    assert not any("cuda" in name or "cublas" in name for name in needed(FOLDER / "libcumoe.so.0.1"))


def test_import_is_light_and_has_one_openmp():
    """Neither transformers nor compilers come along; and two pools of threads would spin against each other."""
    code = ("import sys, torch, cumoe; torch.ones(9); "
            "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}),"
            "any(m in sys.modules for m in ('transformers', 'torch._inductor.compile_fx')))")
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "1 False\n"


@pytest.mark.parametrize("prepare, sentence", [
    ("torch = None", "cumoe needs PyTorch 2.11 or later, which cannot be imported"),
    ("torch.__version__ = '2.10.1'", "cumoe needs PyTorch 2.11 or later, but this is 2.10.1"),
    ("pathlib.Path.glob = lambda *a: []", "pip install ./torch, in cumoe's sources, builds them"),
    ("torch.ops.load_library = lambda *a: open('libc10.so')", "do not load: .*libc10.so"),
])
def test_what_is_missing_is_said(prepare, sentence):
    """Of a PyTorch that is none, which is quicker to import."""
    code = f"""
import pathlib, sys, types
torch = types.SimpleNamespace(__version__="2.11.0+cu130", ops=types.SimpleNamespace())
{prepare}
sys.modules["torch"] = torch
import cumoe
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and re.search(f"ImportError: .*{sentence}", run.stderr), run.stderr


def test_an_old_pytorch_is_refused_before_anything_is_compiled(tmp_path):
    """As pip asks setup.py; with the newest PyTorch that is too old, then with one that is not."""
    (tmp_path / "torch/include/torch").mkdir(parents=True)
    for version, refused in ("2.10.1+cu130", True), ("2.11.0a0", False):
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
        run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=pathlib.Path(__file__).parents[1],
                             env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert (run.returncode != 0) == refused
        assert (f"is PyTorch {version}, but must be 2.11 or later: pip install --upgrade torch" in run.stderr) == refused
