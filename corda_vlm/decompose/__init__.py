"""Context-oriented decompositions of one weight matrix (CorDA, arXiv 2406.05223, section 3).

Pure tensor functions: no model, no file, no configuration.

A linear layer is `y = W x` with `W` of shape (out, inp); `C` (inp, inp) is the mean second moment of its
inputs and `C' = C + damping * mean(diag C) * I`. CorDA decomposes `W C' = U S V^T` and takes the adapter
`B = U_r S_r^1/2`, `A = S_r^1/2 V_r^T C'^-1`. No inverse is needed: `U^T W C' = S V^T` gives

    A = S_r^-1/2 U_r^T W,        B A = U_r U_r^T W,

so the adapter is `W` seen through r directions of its output, and only the left singular vectors of the
*oriented* matrix `G = W C'^power` have to be found. All members of the family differ in that basis alone:

    power 0    PiSSA (largest), MiLoRA (smallest)      `W W^T`            no data
    power 1/2  energy of the outputs                   `W C' W^T`
    power 1    CorDA: IPM (largest), KPM (smallest)    `W C'^2 W^T`
    side="input"  LoRA-Null, KORE (smallest)           `B A = W P P^T`, P eigenvectors of `C'`; at
                  power 0 P are the right singular vectors of `W`, and the sides agree
    gradient, C'^-1/2  the natural-gradient start        `A = U_r^T G C'^-1`, `B = 0`: see `gradient.py`
    two covariances    SC-LoRA (largest)               `W [(1-b) C_task - b C_keep] W^T`
    W - Q(W), C'^1/2   QERA, LoftQ without C (largest)  what quantising took away: see `rounding.py`

The smallest components are what KPM trains, and they are easily lost: `G G^T` squares the condition
number, and a float32 inverse and SVD of `G` return a subspace that holds several times the least energy.
`basis.py` has the two routes that keep them.
"""

from __future__ import annotations

from corda_vlm.decompose.contrast import check_beta, decompose_contrast
from corda_vlm.decompose.decomposition import Decomposition, check_damping_and_norm, decompose
from corda_vlm.decompose.energy import damp, knowledge_energy, relative_damage
from corda_vlm.decompose.gradient import (
    decompose_gradient,
    decompose_keep_lora,
    decompose_lora_ga,
    gradient_spectrum,
)
from corda_vlm.decompose.orient import Root
from corda_vlm.decompose.rounding import RoundingError, decompose_error, rounding_error

__all__ = [
    "Decomposition",
    "Root",
    "RoundingError",
    "check_beta",
    "check_damping_and_norm",
    "damp",
    "decompose",
    "decompose_contrast",
    "decompose_error",
    "decompose_gradient",
    "decompose_keep_lora",
    "decompose_lora_ga",
    "gradient_spectrum",
    "knowledge_energy",
    "relative_damage",
    "rounding_error",
]
