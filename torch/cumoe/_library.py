"""Loads the operators, or says what is missing."""

import pathlib

OLDEST_TORCH = (2, 11)


def _load():
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"cumoe needs PyTorch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later, which cannot be "
                          f"imported ({error}): pip install torch") from error
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH:
        raise ImportError(f"cumoe needs PyTorch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later, but this is "
                          f"{torch.__version__}: pip install --upgrade torch")
    found = sorted(pathlib.Path(__file__).parent.glob("_ops*.so"))
    if not found:
        raise ImportError(f"cumoe's operators (_ops.abi3.so) are not in {pathlib.Path(__file__).parent}: "
                          "pip install ./torch, in cumoe's sources, builds them")
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        raise ImportError(f"cumoe's operators do not load: {error}. They need libcumoe.so beside them and PyTorch's "
                          f"own libraries: pip install --force-reinstall ./torch") from error
    number = torch.ops.cumoe.version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


LIBRARY_VERSION = _load()
