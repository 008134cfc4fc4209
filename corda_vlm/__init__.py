"""Fine-tune vision-language models without losing what they know.

    from corda_vlm import adapt, export_adapter, load_model

    loaded = load_model("emoji-clip")
    model = adapt(loaded.model, calibration_batches, mode="kpm", rank=16)
    ...  # train `model` as any PEFT model
    export_adapter(model, "adapter", format="merged")

Names are imported on first use, so that `import corda_vlm` and `corda-vlm --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corda_vlm.adapter import (
        adapt,
        attach_adapter,
        export_adapter,
        import_adapter,
        load_adapter,
        restore,
    )
    from corda_vlm.anchor import anchor_penalty
    from corda_vlm.covariance import (
        Covariance,
        CovarianceStore,
        GradientStore,
        collect_covariance,
        collect_gradient,
    )
    from corda_vlm.data import register_source
    from corda_vlm.errors import CordaError
    from corda_vlm.evaluation import (
        Score,
        Suite,
        ask,
        classify,
        evaluate,
        load_suite,
        register_metric,
        register_task,
    )
    from corda_vlm.families import FAMILIES, Loaded, load_model, register_family
    from corda_vlm.files import asset
    from corda_vlm.methods import METHODS, prepare_method, register_method
    from corda_vlm.plan import AdapterPlan, plan_adapter
    from corda_vlm.ranks import register_rank_rule
    from corda_vlm.sites import Site, find_sites
    from corda_vlm.train import AnchorMixin, task_gradient

__version__ = "0.1.0"

_HOME = {
    "FAMILIES": "families",
    "METHODS": "methods",
    "AdapterPlan": "plan",
    "AnchorMixin": "train",
    "CordaError": "errors",
    "Covariance": "covariance",
    "CovarianceStore": "covariance",
    "GradientStore": "covariance",
    "Loaded": "families",
    "Score": "evaluation",
    "Site": "sites",
    "Suite": "evaluation",
    "adapt": "adapter",
    "anchor_penalty": "anchor",
    "ask": "evaluation",
    "asset": "files",
    "attach_adapter": "adapter",
    "classify": "evaluation",
    "collect_covariance": "covariance",
    "collect_gradient": "covariance",
    "evaluate": "evaluation",
    "export_adapter": "adapter",
    "find_sites": "sites",
    "import_adapter": "adapter",
    "load_adapter": "adapter",
    "load_model": "families",
    "load_suite": "evaluation",
    "plan_adapter": "plan",
    "prepare_method": "methods",
    "register_family": "families",
    "register_method": "methods",
    "register_metric": "evaluation",
    "register_rank_rule": "ranks",
    "register_source": "data",
    "register_task": "evaluation",
    "restore": "adapter",
    "task_gradient": "train",
}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'corda_vlm' has no attribute {name!r}")
    return getattr(import_module(f"corda_vlm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
