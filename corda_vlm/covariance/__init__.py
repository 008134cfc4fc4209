"""Covariances of layer inputs: collected while a model runs, kept by site name, stored in safetensors."""

from __future__ import annotations

from corda_vlm.covariance.collect import collect_covariance
from corda_vlm.covariance.moments import PRECISIONS, SecondMoment
from corda_vlm.covariance.observe import Observer, observe
from corda_vlm.covariance.store import Covariance, CovarianceStore, Progress

__all__ = [
    "PRECISIONS",
    "Covariance",
    "CovarianceStore",
    "Observer",
    "Progress",
    "SecondMoment",
    "collect_covariance",
    "observe",
]
