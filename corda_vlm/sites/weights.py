"""The weight of every layer that can be a site, by the name it has in the base model.

Names are those of the base model with its attention unpacked: they do not change when the model is packed, or wrapped by PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import NoSitesError
from corda_vlm.families import unwrap
from corda_vlm.families.layers.attention import is_packed, packed_parts
from corda_vlm.families.layers.conv1d import is_conv1d
from corda_vlm.families.layers.conv2d import is_conv2d, left_out
from corda_vlm.families.layers.experts import Slice, is_router, is_stack, slices_of, stacked_weights
from corda_vlm.families.layers.matrix import Matrix, matrix_of, stored
from corda_vlm.families.layers.walk import inner_layer, layers_of


def get_linear(model: nn.Module, name: str, *, as_trained: bool = False) -> nn.Linear:
    """The layer of a site as of `get_layer`, where that has to be an `nn.Linear`."""
    layer = get_layer(model, name, as_trained=as_trained)
    if not isinstance(layer, nn.Linear):
        raise NoSitesError(f"{name} is a {type(layer).__name__}, not an nn.Linear")
    return layer


def get_layer(model: nn.Module, name: str, *, as_trained: bool = False) -> nn.Linear | nn.Conv2d:
    """The base layer of a site, inside PEFT's wrappers too.

    Args:
        as_trained: of a module that `modules_to_save` trains whole, PEFT's trained copy, not the original.

    Raises:
        NoSitesError: no such layer, or it is a part of a packed attention layer (see `attention.unpacked`).
    """
    module: nn.Module = unwrap(model)
    for step, key in enumerate(parts := name.split(".")):
        if is_packed(module):
            raise NoSitesError(
                f"{name}: {'.'.join(parts[:step])} is packed, so its parts are no modules yet; "
                "work under corda_vlm.families.layers.attention.unpacked(model)"
            )
        if is_stack(module):
            raise NoSitesError(
                f"{name}: {'.'.join(parts[:step])} keeps its experts in one parameter, so that none is a module yet; "
                "work under corda_vlm.families.layers.attention.unpacked(model)"
            )
        child = module._modules.get(key)
        if child is None:
            raise NoSitesError(f"{type(unwrap(model)).__name__} has no layer {name!r}")
        module = inner_layer(child, as_trained=as_trained)
    if is_conv1d(module):
        raise NoSitesError(
            f"{name} is a Conv1D, which is no nn.Linear yet; work under corda_vlm.families.layers.attention.unpacked(model)"
        )
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and is_conv2d(module)):
        return module
    why = left_out(module)
    raise NoSitesError(
        f"{name} is a {type(module).__name__}, "
        + (f"{why}" if why else "neither an nn.Linear nor an nn.Conv2d")
    )


def site_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of these sites' weights, packed or not; the model is walked once for all of them.

    Raises:
        NoSitesError: the model has no such layer.
    """
    return {name: matrix.shape for name, matrix in matrices_at(model, names).items()}


def site_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of one site's weight; raises as `site_shapes` does."""
    return site_shapes(model, [name])[name]


def site_slices(model: nn.Module) -> dict[str, Slice]:
    """Site name -> where its weight lies, of those that are no module of their own: experts in a stack, and routers."""
    found: dict[str, Slice] = {}
    for path, module in layers_of(unwrap(model)):
        found |= slices_of(module, path)
    return found


def site_weights(model: nn.Module, names: Iterable[str]) -> SiteWeights:
    """Name -> weight of these sites, packed or not; raises as `site_shapes` does."""
    return SiteWeights(matrices_at(model, names))


class SiteWeights(Mapping[str, Tensor]):
    """Site name -> weight (out, inp), detached, read each time it is looked up.

    A weight that is stored as a matrix is a view of its storage. One that is stored otherwise is made dense, and kept by nobody: all
    at once would take the memory that the storage saves.

    Attributes:
        shapes: site name -> (out, inp), for which nothing is read.
    """

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self._matrices = matrices
        self.shapes = {name: matrix.shape for name, matrix in matrices.items()}

    def __getitem__(self, name: str) -> Float[Tensor, "out inp"]:
        return self._matrices[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def matrices_at(model: nn.Module, names: Iterable[str]) -> dict[str, Matrix]:
    """Name -> weight of these sites; the model is walked once for all of them."""
    bare = unwrap(model)
    matrices, found = all_matrices(bare), {}
    for name in names:
        if name not in matrices:
            raise NoSitesError(f"{type(bare).__name__} has no layer {name!r}")
        found[name] = matrices[name]
    return found


def all_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Base name -> weight of every linear layer and convolution, the parts of packed attention and wrapped layers included."""
    return dict(_weights(model))


def _weights(model: nn.Module) -> Iterator[tuple[str, Matrix]]:
    for path, layer in layers_of(model):
        if is_packed(layer):
            for part, (weight, _) in packed_parts(layer).items():
                yield f"{path}.{part}", stored(weight)
        elif is_stack(layer):
            for name, expert, weight in stacked_weights(layer):
                yield f"{path}.{name}.{expert}", stored(weight)
        elif (matrix := matrix_of(layer)) is not None:
            yield path, matrix
        elif is_router(layer):
            yield path, stored(layer.weight)
