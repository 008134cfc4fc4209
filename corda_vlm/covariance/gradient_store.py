"""The gradient of a task's loss with respect to each weight matrix, as a value and as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.names import quoted
from corda_vlm.same_model import is_made_from
from corda_vlm.sites import model_fingerprint
from corda_vlm.tensors import LazyTensors, save_tensors

FORMAT, VERSION = "corda_vlm.gradient", 1
_WHAT, _AGAIN = "gradient of a task", "collect it again (corda-vlm gradient, collect_gradient)"


class GradientStore(Mapping[str, Tensor]):
    """Site name -> mean gradient `∂L/∂W` (out, inp) of the batches, float32 on the CPU.

    Attributes:
        model_fingerprint: of the model it was taken at.
        model_signs: of the same, see `same_model`; None in files of former versions.
        data_fingerprint: of the batches and of the loss.
        asked: the sites that it was asked for; those that the loss does not depend on have no gradient.
        batches: how many it is the mean of.
        complete: False of a checkpoint, which holds the sums.
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        *,
        model_fingerprint: str,
        data_fingerprint: str,
        batches: int,
        asked: Sequence[str] | None = None,
        complete: bool = True,
        model_signs: str | None = None,
    ) -> None:
        self._gradients = gradients
        self.asked = tuple(gradients if asked is None else asked)
        self.model_fingerprint, self.data_fingerprint = model_fingerprint, data_fingerprint
        self.batches, self.complete, self.model_signs = batches, complete, model_signs

    def __getitem__(self, site: str) -> Float[Tensor, "out inp"]:
        if site not in self._gradients:
            raise CordaError(
                f"the gradient has nothing of site {site!r} (it has {len(self._gradients)} sites: {quoted(list(self))}); "
                "collect it for that site too, or leave the site out with towers=, roles= or targets="
            )
        return self._gradients[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)

    def __contains__(self, site: object) -> bool:
        return site in self._gradients

    def __repr__(self) -> str:
        return f"<GradientStore: {len(self)} sites, mean of {self.batches} batches>"

    def summary(self) -> str:
        """What was collected, in a line."""
        of = "" if len(self) == len(self.asked) else f" of {len(self.asked)}"
        return f"the loss's gradient of {len(self)}{of} weight matrices, mean of {self.batches} batches"

    def save(self, path: str | Path) -> None:
        """Write safetensors, atomically.

        Raises:
            CordaError: NaN or Inf, or nothing can be written there.
        """
        about = {
            "version": VERSION,
            "model": self.model_fingerprint,
            "signs": self.model_signs,
            "data": self.data_fingerprint,
            "batches": self.batches,
            "asked": self.asked,
            "complete": self.complete,
        }
        header = {"format": FORMAT, "about": json.dumps(about)}
        save_tensors(path, {name: self[name] for name in self}, header)

    @classmethod
    def load(
        cls, path: str | Path, *, model: nn.Module | None = None, unfinished: bool = False
    ) -> GradientStore:
        """Read what `save` wrote; the matrices are read when they are asked for.

        Args:
            model: refuse a gradient of another one.
            unfinished: take a checkpoint too.

        Raises:
            ForeignFileError: missing, damaged, unfinished, or of another model.
        """
        tensors = LazyTensors(path, _WHAT, _AGAIN)
        if tensors.metadata.get("format") != FORMAT:
            raise ForeignFileError(
                f"{path} is a safetensors file, but no gradient; give the file that collect_gradient or `corda-vlm "
                "gradient` wrote"
            )
        try:
            about = json.loads(tensors.metadata["about"])
            store = cls(
                tensors,
                model_fingerprint=str(about["model"]),
                data_fingerprint=str(about["data"]),
                batches=int(about["batches"]),
                asked=[str(name) for name in about["asked"]],
                complete=bool(about["complete"]),
                model_signs=about.get("signs"),
            )
            version = about["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise ForeignFileError(f"{path}: its header is damaged ({error}); {_AGAIN}") from error
        if version != VERSION:
            raise ForeignFileError(
                f"{path} has version {version} of the format, and this corda_vlm reads {VERSION}; {_AGAIN}"
            )
        if not store.complete and not unfinished:
            raise ForeignFileError(
                f"{path} is the checkpoint of a gradient that was stopped after {store.batches} batches; run the command that "
                "collects it again, and it goes on from there"
            )
        if model is not None and not is_made_from(
            model, store.model_fingerprint, store.model_signs, f"the gradient {path}"
        ):
            own = model_fingerprint(model)
            raise ForeignFileError(
                f"{path} is the gradient of the model {store.model_fingerprint}, and this one is {own}: other layers or other "
                f"weights; {_AGAIN}"
            )
        return store
