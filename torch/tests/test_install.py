"""What was built, and what it says where something is missing."""

import os
import pathlib
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


def test_one_openmp():
    """Two pools of threads would spin against each other."""
    code = ("import torch, cumoe; torch.ones(9); "
            "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}))")
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("prepare, sentence", [
    ("sys.modules['torch'] = None", "cumoe needs PyTorch 2.11 or later, which cannot be imported"),
    ("import torch; torch.__version__ = '2.10.1'", "cumoe needs PyTorch 2.11 or later, but this is 2.10.1"),
    ("import pathlib; pathlib.Path.glob = lambda *a: []", "pip install ./torch, in cumoe's sources, builds them"),
    ("import torch; torch.ops.load_library = lambda *a: exec('raise OSError(\"libc10.so: no\")')", "do not load: libc10"),
])
def test_what_is_missing_is_said(prepare, sentence):
    code = f"import sys; {prepare}\nimport cumoe"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and f"ImportError: " in run.stderr and sentence in run.stderr, run.stderr


def test_an_old_pytorch_is_refused_before_anything_is_compiled(tmp_path):
    """As pip asks setup.py; with the newest PyTorch that is too old, then with one that is not."""
    (tmp_path / "torch/include/torch").mkdir(parents=True)
    for version, refused in ("2.10.1+cu130", True), ("2.11.0a0", False):
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
        run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=pathlib.Path(__file__).parents[1],
                             env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert (run.returncode != 0) == refused
        assert (f"is PyTorch {version}, but must be 2.11 or later: pip install --upgrade torch" in run.stderr) == refused


def test_import_is_light():
    """Neither transformers nor compilers come along."""
    code = "import sys, cumoe; print(any(m in sys.modules for m in ('transformers', 'torch._inductor.compile_fx')))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
