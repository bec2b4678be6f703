"""What is measured, and in which order. Needs nothing but Python, so that a dry run works anywhere."""

import importlib.util
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    name: str
    T: int  # tokens
    H: int  # model width
    I: int  # noqa: E741  # width of an expert
    E: int  # experts
    K: int  # experts per token


# Named and sized as in perf/models.c (a test compares them); here with tokens.
SHAPES = [
    Shape("qwen3-30b-a3b", 32768, 2048, 768, 128, 8),
    Shape("mixtral-8x7b", 4096, 4096, 14336, 8, 2),
    Shape("sonic-120b-n1024", 32768, 4096, 1024, 128, 8),
    Shape("deepseek-v3", 4096, 7168, 2048, 256, 8),
    Shape("paper-256", 32768, 512, 1024, 256, 4),
    Shape("olmoe", 32768, 2048, 1024, 64, 8),
    Shape("qwen3-next-80b-a3b", 32768, 2048, 512, 512, 10),
    Shape("qwen3-235b-a22b", 32768, 4096, 1536, 128, 8),
    Shape("sonic-1.4b-n256", 40960, 768, 256, 128, 8),
    Shape("sonic-1.4b-n512", 40960, 768, 512, 64, 4),
    Shape("sonic-1.4b-n1024", 40960, 768, 1024, 32, 2),
    Shape("sonic-7b-n256", 24576, 1536, 256, 128, 8),
    Shape("sonic-7b-n512", 24576, 1536, 512, 64, 4),
    Shape("sonic-7b-n1024", 24576, 1536, 1024, 32, 2),
    Shape("sonic-30b-n256", 32768, 4096, 256, 256, 16),
    Shape("sonic-30b-n512", 32768, 4096, 512, 128, 8),
    Shape("sonic-30b-n1024", 32768, 4096, 1024, 64, 4),
    Shape("sonic-120b-n512", 32768, 4096, 512, 256, 16),
    Shape("sonic-120b-n2048", 32768, 4096, 2048, 64, 4),
]
ON_CPU = [Shape("tiny", 96, 64, 32, 8, 2), Shape("tiny-uneven", 67, 40, 24, 30, 3)]  # experts without tokens, too
IN_FULL = 3  # of the first shapes everything is measured, of the others SwiGLU under given routing
ACTIVATIONS = ("swiglu", "relu")
ROUTINGS = ("given", "own")


@dataclass(frozen=True)
class Entry:
    """Who takes part, in what."""

    contestant: str
    module: str = "torch"
    activations: tuple = ACTIVATIONS
    routings: tuple = ROUTINGS
    device: str = ""  # where alone it runs
    in_full: bool = False  # takes part in full measurements alone

    def takes_part(self, activation, routing, in_full):
        return activation in self.activations and routing in self.routings and (in_full or not self.in_full)

    def absent(self, device):
        """Why it cannot run here, or None."""
        if self.device not in ("", device):
            return f"{self.contestant} runs on {self.device} alone"
        if importlib.util.find_spec(self.module) is None:
            return f"{self.contestant}: there is no Python package {self.module}"
        return None


# JAX comes last everywhere: the memory that it has taken it keeps.
ENTRIES = [
    Entry("dense", routings=("given",)),
    Entry("loop"),
    Entry("grouped_mm"),
    Entry("transformers-eager", "transformers", ("swiglu",)),
    Entry("transformers-grouped_mm", "transformers"),
    Entry("scattermoe", "scattermoe", device="cuda"),
    Entry("cumoe", "cumoe"),
    Entry("stages", activations=("swiglu",), routings=("given",), in_full=True),
    Entry("ragged_dot", "jax", in_full=True),
]


@dataclass(frozen=True)
class Cell:
    """One contestant on one problem."""

    shape: Shape
    activation: str
    routing: str
    entry: Entry

    def __str__(self):
        return f"{self.shape.name}, {self.activation}, {self.routing} routing, {self.entry.contestant}"


def plan(shapes, in_full, entries, activations=ACTIVATIONS, routings=ROUTINGS):
    """Cells in the order of their importance: time that runs out takes the last ones."""
    first = (activations[0], routings[0])
    cells = [
        Cell(shape, *problem, entry)
        for number, shape in enumerate(shapes)
        for problem in itertools.product(activations, routings)
        for entry in entries
        if entry.takes_part(*problem, number < in_full) and (number < in_full or problem == first)
    ]
    return sorted(cells, key=lambda cell: cell.entry.module == "jax")
