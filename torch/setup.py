"""Builds the operators (ops.cc, ranks.cc) with a plain C++ compiler, and puts libcumoe.so beside it.

Environment:
  CUMOE_LIBRARY  a libcumoe.so to take; else the installed one that pkg-config knows, else it is built (CMake)
  CUMOE_CUDA     for that build: auto (where nvcc 13 is there), system, wheels, off    [auto]
  CXX            the C++ compiler                                                      [c++]
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = HERE.parent  # of the library
OLDEST_TORCH = "2.11"
ABI = "0x020b000000000000"  # of that version: TORCH_TARGET_VERSION
# The libraries that the operators need of PyTorch. libtorch itself leads to those for CUDA where PyTorch has them.
TORCH_LIBRARIES = ("torch", "torch_cpu", "c10")


def library_version():
    header = (SOURCES / "include/cumoe/version.h").read_text()
    return tuple(int(re.search(rf"#define CUMOE_VERSION_{part} +(\d+)", header)[1])
                 for part in ("MAJOR", "MINOR", "PATCH"))


def release(version):
    return tuple(int(part) for part in version.split(".")[:2])


def find_torch():
    """The folder of an installed PyTorch, which need not be importable: pip hides it from builds."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in folders:
        torch = pathlib.Path(folder or ".") / "torch"
        if (torch / "include/torch").is_dir() and (torch / "version.py").is_file():
            version = re.search(r"^__version__ = '(.*)'", (torch / "version.py").read_text(), re.MULTILINE)[1]
            if release(version) < release(OLDEST_TORCH):
                sys.exit(f"cumoe: {torch} is PyTorch {version}, but must be {OLDEST_TORCH} or later: pip install "
                         "--upgrade torch")
            return torch
    return None


def run(*command):
    print(" ".join(shlex.quote(str(word)) for word in command), file=sys.stderr, flush=True)
    try:
        subprocess.run([str(word) for word in command], check=True)
    except FileNotFoundError:
        sys.exit(f"cumoe: {command[0]} is missing")
    except subprocess.CalledProcessError as error:
        sys.exit(f"cumoe: {command[0]} failed ({error.returncode})")


def installed_library():
    """The library that pkg-config knows, if it has the version of these sources."""
    def ask(*what):
        return subprocess.run(["pkg-config", *what, "cumoe"], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if ask("--modversion") != ".".join(map(str, library_version())):
            return None
        return pathlib.Path(ask("--variable=libdir")) / "libcumoe.so"
    except (OSError, subprocess.CalledProcessError):
        return None


def built_library(folder):
    parts = ("-DCUMOE_TESTS=OFF", "-DCUMOE_EXAMPLES=OFF", "-DCUMOE_PERF=OFF")
    run("cmake", "-S", SOURCES, "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
        f"-DCUMOE_CUDA={os.environ.get('CUMOE_CUDA', 'auto')}", *parts)
    run("cmake", "--build", folder, "--target", "cumoe", "-j", os.cpu_count() or 1)
    return folder / "libcumoe.so"


def find_library(folder):
    named = os.environ.get("CUMOE_LIBRARY")
    library = pathlib.Path(named) if named else installed_library() or built_library(folder)
    if not library.is_file():
        sys.exit(f"cumoe: {library} is not there")
    return library.resolve()


class BuildOperators(build_ext):
    def build_extension(self, extension):
        torch = find_torch()
        if not torch:
            sys.exit(f"cumoe: PyTorch {OLDEST_TORCH} or later is missing: pip install torch")
        out = pathlib.Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        library = find_library(pathlib.Path(self.build_temp).resolve() / "libcumoe")
        major, minor, _ = library_version()
        copy = out.parent / f"libcumoe.so.{major}.{minor}"  # its soname
        shutil.copyfile(library, copy)
        run(os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden",
            f"-DTORCH_TARGET_VERSION={ABI}", "-isystem", torch / "include", "-I", SOURCES / "include", HERE / "ops.cc",
            HERE / "ranks.cc", "-o", out, copy, "-L", torch / "lib", "-Wl,--no-as-needed", *(f"-l{name}" for name in TORCH_LIBRARIES),
            "-Wl,-rpath,$ORIGIN")


class StableWheel(bdist_wheel):
    def finalize_options(self):
        self.py_limited_api = "cp310"
        super().finalize_options()


setup(version=".".join(map(str, library_version())),
      ext_modules=[Extension("cumoe._ops", ["ops.cc", "ranks.cc"],
                             depends=["call.h", "ranks.h", "tensors.h", "weights.h"], py_limited_api=True)],
      setup_requires=[] if find_torch() else [f"torch=={OLDEST_TORCH}.0"],
      cmdclass={"build_ext": BuildOperators, "bdist_wheel": StableWheel})
