"""Covariances of layer inputs: collected while a model runs, kept by site name, stored in safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.covariance.collect import collect_covariance
    from corda_vlm.covariance.gradient import collect_gradient
    from corda_vlm.covariance.gradient_store import GradientStore
    from corda_vlm.covariance.moments import PRECISIONS, SecondMoment
    from corda_vlm.covariance.observer import Observer, observe
    from corda_vlm.covariance.options import CalibrationOptions, CollectOptions
    from corda_vlm.covariance.store import Covariance, CovarianceStore, Progress

_HOMES = {
    "CalibrationOptions": "options",
    "CollectOptions": "options",
    "Covariance": "store",
    "CovarianceStore": "store",
    "GradientStore": "gradient_store",
    "Observer": "observer",
    "PRECISIONS": "moments",
    "Progress": "store",
    "SecondMoment": "moments",
    "collect_covariance": "collect",
    "collect_gradient": "gradient",
    "observe": "observer",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
