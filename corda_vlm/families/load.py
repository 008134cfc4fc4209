"""One way to load a model of any family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from corda_vlm.errors import CordaError, first_line
from corda_vlm.families.base import Family, Loaded, Processor
from corda_vlm.families.clip_hf import CLIP_HF
from corda_vlm.families.clip_open import CLIP_OPEN
from corda_vlm.families.layers.quantized import keep_exact
from corda_vlm.families.loading.gguf import converted
from corda_vlm.families.loading.hub import config_of, without_bars
from corda_vlm.families.loading.quantization import quantize_model, warn_of_experts, warn_of_misread
from corda_vlm.families.loading.sources import FORMS, built_in, check_source
from corda_vlm.families.loading.trust import REFUSAL, RemoteCodeError, loading, wants_code
from corda_vlm.families.lookalike import LOOKALIKE, generates
from corda_vlm.families.options import LoadKeywords, LoadOptions
from corda_vlm.families.registry import FAMILIES, chosen, detect_family
from corda_vlm.files import home_path
from corda_vlm.options import options_from
from corda_vlm.tensors import check_tensors
from corda_vlm.yaml_file import read_yaml


def load_model(source: str | Path, **options: Unpack[LoadKeywords]) -> Loaded:
    """Load a model and what feeds it.

    Args:
        source: "emoji-clip" or another built-in name (add "-hf" for the same weights as a transformers
            `CLIPModel`), a folder, an id on a hub, or a GGUF file, which is converted once (see `families.loading.gguf`).
        options: of `LoadOptions`.

    Raises:
        UnknownNameError: no such built-in name, family, open_clip model or pretrained tag.
        RemoteCodeError: the model wants code of its own to be run.
        CordaError: the folder is in no known format, its weights are quantised as is not known here, or incomplete, a hub cannot be reached,
            or there is no such device.
    """
    check_source(source)
    family, asked = options.get("family", "auto"), _checked(options)
    dtype, device = options.get("dtype", asked.dtype), options.get("device", asked.device)
    device = _usable(device)
    how = _How(
        getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        asked.device_map,
        asked.quantization,
        device,
    )
    with loading(asked.trust_remote_code):
        if (path := home_path(source)).suffix == ".gguf" and path.is_file():
            source = converted(path)
        model, processor, found = _load(source, family, how)
    # Not to the dtype, which its family loaded it in: a language model keeps its rotary frequencies in float32.
    if asked.device_map is None and asked.quantization is None:
        model = model.to(device)
    keep_exact(model)
    warn_of_misread(model)
    warn_of_experts(model)
    return Loaded(model.eval(), processor, found, str(source))


def _checked(keywords: LoadKeywords) -> LoadOptions:
    """The options that were given by their names; a dtype or a device itself needs no check."""
    given: dict[str, Any] = dict(keywords)
    if isinstance(family := given.get("family"), Family):
        given["family"] = family.name
    for name, kind in (("dtype", torch.dtype), ("device", (torch.device, int))):
        if isinstance(given.get(name), kind):
            del given[name]
    return options_from(LoadOptions, given, "load_model")


def _load(source: str | Path, family: str | Family, how: _How) -> _Parts:
    text = str(source).removeprefix("local-dir:")
    path = home_path(text)
    zoo = built_in()
    if text in zoo:  # before a folder of that name in the working directory, which is './NAME'
        return _load_zoo(zoo[text], family, how)
    if path.is_dir():
        return _load_folder(path, family, how)
    if text.endswith("-hf") and text.removesuffix("-hf") in zoo:
        return _load_converted(zoo[text.removesuffix("-hf")], how)
    if text.startswith("hf-hub:"):
        return _load_remote(CLIP_OPEN, text, how)
    return _load_remote(_remote_family(text, family), text, how)


@dataclass(frozen=True)
class _How:
    dtype: torch.dtype
    device_map: Any
    quantization: str | None
    device: torch.device

    def load(self, family: Family, source: str | Path) -> tuple[nn.Module, Processor]:
        if family.load is None:
            raise CordaError(
                f"the family {family.name!r} does not say how its models are loaded; load it by its own library, "
                "and give the model instead of a name"
            )
        options = {} if self.device_map is None else {"device_map": self.device_map}
        if options and family.generative is None:
            raise CordaError(f"device_map is for language models; {family.name} takes device=")
        if self.quantization is not None and family.generative is not None:
            options["quantization"] = self.quantization
            options["device_map"] = self.device_map or {"": self.device}
        with without_bars(source):
            model, processor = family.load(source, self.dtype, **options)
        if self.quantization is not None and family.generative is None:
            if family is not CLIP_HF:
                raise CordaError(
                    f"quantization is for models of transformers, and {source} is read by {family.name}. Of a built-in model add "
                    "-hf to its name"
                )
            # afterwards: transformers would also quantise what the pooling head of SigLIP reads as a matrix
            model = quantize_model(model.to(self.device), self.quantization)
        return model, processor


def _usable(device: str | int | torch.device) -> torch.device:
    """`device`, once a number could be put there: better told before a model is read than after."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CordaError(
            f"device {str(device)!r} cannot be used ({first_line(error)}); give auto, cpu, or cuda or cuda:N where there is such a GPU"
        ) from error


@contextmanager
def _explained(what: str, failure: str, remedy: str = "") -> Iterator[None]:
    """Errors of the libraries that load models, which are of every kind, become ours.

    Raises:
        RemoteCodeError: `what`, the model, wants code of its own to be run.
        CordaError: `failure`, the error, and `remedy`.
    """
    try:
        yield
    except CordaError:
        raise
    except Exception as error:
        if wants_code(error):
            raise RemoteCodeError(f"{what} {REFUSAL}") from error
        raise CordaError(
            f"{failure} ({type(error).__name__}: {first_line(error)}){remedy}"
        ) from error


_Parts = tuple[nn.Module, Processor, Family]


def _load_zoo(folder: Path, family: str | Family, how: _How) -> _Parts:
    """A built-in model, or for a card without weights the hub model that it names as its `source`."""
    if not any(known.reads(folder) for known in FAMILIES.values()):
        card = read_yaml(folder / "card.yaml")
        source = card.get("source") if isinstance(card, dict) else None
        if isinstance(source, str):
            return _load_remote(_remote_family(source, family), source, how)
    return _load_folder(folder, family, how)


def _load_folder(folder: Path, family: str | Family, how: _How) -> _Parts:
    families = (*FAMILIES.values(), LOOKALIKE)
    found = chosen(family) or next((one for one in families if one.reads(folder)), None)
    if found is None:
        beside = sorted(entry.name for entry in folder.iterdir())
        hint = (
            "It holds an adapter: load the model it was trained on, then corda_vlm.load_adapter(model, folder)."
            if "adapter_config.json" in beside
            else f"It has: {', '.join(beside[:12]) or 'nothing'}."
        )
        raise CordaError(
            f"{folder} is no model of a known format. Expected open_clip's files (open_clip_config.json and "
            "open_clip_model.safetensors) or those of transformers (config.json with a known model_type, and "
            f"model.safetensors). {_of_unknown_type(folder)}{hint}"
        )
    what = f"the model in {folder}"
    with _explained(
        what,
        f"{what} does not load as {found.name}; its files may be truncated or belong to another model",
    ):
        loaded = how.load(found, folder)
        if found is LOOKALIKE:
            detect_family(loaded[0])  # says why not, where it does not look like one
    # Afterwards, as what the configuration refuses need not be read. A bit that flipped stops no library.
    for weights in sorted(folder.glob("*.safetensors")):
        check_tensors(weights, "model weights", "export or download them again")
    return (*loaded, found)


def _of_unknown_type(folder: Path) -> str:
    """What to say of a `config.json` whose model_type no family has."""
    kind = config_of(folder).get("model_type")
    known = [kind for family in FAMILIES.values() for kind in family.model_types]
    if not kind or any(kind in family.model_types for family in FAMILIES.values()):
        return ""
    return (
        f"Its model_type is {kind!r}; known are CLIP's and SigLIP's and {', '.join(known)}, and corda_vlm.families.llm "
        "says how to declare another. "
    )


def _load_converted(folder: Path, how: _How) -> _Parts:
    from corda_vlm.families.loading.convert import convert_loaded

    model, _, _ = _load_folder(folder, CLIP_OPEN, replace(how, quantization=None))
    model, processor = convert_loaded(model)
    model = model.to(how.dtype)
    if how.quantization is not None:
        model = quantize_model(model.to(how.device), how.quantization)
    return model, processor, CLIP_HF


def _remote_family(source: str, family: str | Family) -> Family | None:
    """Which library to ask for a name with a slash: open_clip knows its models; None where the hub has to say."""
    if (asked := chosen(family)) is not None:
        return asked
    import open_clip

    return CLIP_OPEN if source.split("/")[0] in open_clip.list_models() else None


def _hub_family(source: str) -> Family:
    """The family of a hub model, by its configuration; CLIP's loader knows more kinds than are declared."""
    from transformers import PretrainedConfig

    config = PretrainedConfig.get_config_dict(source)[0]
    kind, other = config.get("model_type"), LOOKALIKE if generates(config) else CLIP_HF
    return next((family for family in FAMILIES.values() if kind in family.model_types), other)


def _load_remote(family: Family | None, source: str, how: _How) -> _Parts:
    with _explained(
        f"the model {source!r}",
        f"could not load {source!r} from its hub",
        ", and no folder of that name is here. Check the name and the network, or download it and give its folder. "
        + FORMS,
    ):
        model, processor = how.load(family or _hub_family(source), source)
    return (
        model,
        processor,
        detect_family(model),
    )  # transformers loads SigLIP by the same call as CLIP
