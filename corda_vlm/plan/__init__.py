"""What will be adapted and how: for each site its covariance, rank, components, spectrum and predicted damage.

A plan is a JSON file a person can read, and beside it, under the same name with `.safetensors`, the factors, so that
attaching does not decompose again. The JSON holds the hash of the factors and the fingerprints of the
model and the calibration data; a plan of another model or mode is refused, naming both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.plan.bases import MODES, PLAN_METHODS, PlanMethod
    from corda_vlm.plan.checks import check_made_from, check_rank
    from corda_vlm.plan.make import plan_adapter
    from corda_vlm.plan.options import PlanOptions, Route
    from corda_vlm.plan.plan import AdapterPlan, SitePlan
    from corda_vlm.plan.quantization import QuantizationErrors, quantization_errors

_HOMES = {
    "MODES": "bases",
    "PLAN_METHODS": "bases",
    "AdapterPlan": "plan",
    "PlanMethod": "bases",
    "QuantizationErrors": "quantization",
    "Route": "options",
    "PlanOptions": "options",
    "SitePlan": "plan",
    "check_made_from": "checks",
    "check_rank": "checks",
    "plan_adapter": "make",
    "quantization_errors": "quantization",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
