"""cumoe for PyTorch: the Sparsely-Gated Mixture-of-Experts layer (Shazeer et al., 2017) as operators and modules.

    moe = cumoe.MoE(512, 1024, num_experts=32, top_k=4, activation="swiglu")
    out = moe(x)                        # x [..., 512]; out.y likewise
    (task_loss(out.y) + out.loss).backward()

MoE             the whole layer, with any of the library's gates
Experts         the experts alone, where something else routes
functional      both without parameters of their own
ExpertParallel  ranks that share the experts of a layer: MoE(..., ep=ExpertParallel())
register_transformers()     Hugging Face models: experts_implementation="cumoe"
"""

from ._library import LIBRARY_VERSION  # first: it loads the operators
from . import functional
from .config import Config
from .modules import Experts, MoE
from .output import MoEOutput, Statistics


def register_transformers(name="cumoe"):
    """Let Hugging Face models take cumoe's experts: experts_implementation=name in from_pretrained(), or
    model.set_experts_implementation(name)."""
    from .transformers import register_transformers

    register_transformers(name)


def __getattr__(name):
    """What nobody without ranks should wait for at import."""
    if name in ("ExpertParallel", "exclude_experts"):
        return getattr(functional.load_parallel(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = LIBRARY_VERSION
__all__ = ["Config", "ExpertParallel", "Experts", "MoE", "MoEOutput", "Statistics", "exclude_experts", "functional",
           "register_transformers"]
