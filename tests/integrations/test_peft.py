"""PEFT's CorDA with our moments and decomposition: the same call, any model, any batch size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn

from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.errors import (
    CalibrationError,
    CordaError,
    ForeignFileError,
    NoSitesError,
    UnknownNameError,
)
from corda_vlm.integrations.peft import initialize_lora_corda_weights, preprocess_corda
from corda_vlm.integrations.peft.layers import refuse_quantized
from corda_vlm.integrations.peft.starts import refuse_pickle
from corda_vlm.plan import plan_adapter
from tests.families.language_toy import LANGUAGE
from tests.quantized_toy import quantized

METHODS = ("ipm", "kpm")
TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture
def llama() -> nn.Module:
    return LANGUAGE["llama"]().eval()


def padded(size: int = 7, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens of different lengths; the padding is of tokens that occur nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (size, length), generator=generator)
    lengths = torch.randint(4, length, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.where(mask.bool(), ids, 63), "attention_mask": mask}


BATCHES = [padded(seed=seed) for seed in range(3)]


def config(method: str = "kpm", **options: Any) -> LoraConfig:
    corda = {"cache_file", "covariance_file", "prune_temporary_fields"} & options.keys()
    return LoraConfig(
        **{
            "init_lora_weights": "corda",
            "target_modules": TARGETS,
            "r": 4,
            "lora_alpha": 4,
            **{key: value for key, value in options.items() if key not in corda},
        },
        corda_config=CordaConfig(corda_method=method, **{key: options[key] for key in corda}),
    )


def run_on(model: nn.Module, batches=BATCHES):
    return lambda: [model(**batch) for batch in batches]


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(**padded(seed=9)).logits.float()


def of(model: Any) -> Any:
    return model.peft_config["default"]


def site_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(tuple(TARGETS))]


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_that_of_a_plan_and_changes_nothing(llama, method):
    store = collect_covariance(llama, BATCHES, show_progress=False)
    plan = plan_adapter(llama, store, mode=method, rank=4, a_norm=3.0, show_progress=False)
    before, hooks = outputs(llama), _hooks(llama)
    llama.train()
    preprocess_corda(llama, config(method), run_on(llama), a_norm=3.0)
    assert llama.training
    assert _hooks(llama) == hooks
    for name in site_names(llama):
        start = llama.get_submodule(name).eigens
        assert torch.equal(start.U_WC, plan.factors[name].B)
        assert torch.equal(start.V_WC.mT, plan.factors[name].A)
    peft_model = get_peft_model(llama.eval(), config(method))
    assert torch.allclose(outputs(peft_model), before, atol=1e-5)
    with peft_model.disable_adapter():
        assert not torch.allclose(outputs(peft_model), before, atol=1e-5)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_batches_of_one_without_padding_are_those_of_seven_with_it(llama, tmp_path):
    batch = BATCHES[0]
    alone = [
        {"input_ids": ids[None, : int(mask.sum())]}
        for ids, mask in zip(*batch.values(), strict=True)
    ]
    for name, batches in (("seven", [batch]), ("one", alone)):
        file = tmp_path / name
        preprocess_corda(llama, config(covariance_file=str(file)), run_on(llama, batches))
    seven, one = (CovarianceStore.load(tmp_path / name) for name in ("seven", "one"))
    for site in site_names(llama):
        assert seven[site].count == one[site].count == int(batch["attention_mask"].sum())
        assert torch.allclose(seven[site].matrix, one[site].matrix, rtol=1e-3, atol=1e-6)


class Wrapped(nn.Module):
    """A model that no family knows, with one of transformers inside, which takes the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
            )
        )  # fmt: skip
        self.head = nn.Linear(16, 3)

    def forward(self, batch):
        return self.head(self.bert(**batch).last_hidden_state[:, 0])


class Own(nn.Module):
    """A model that no family knows, whose parts see no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.first = nn.Linear(16, 12)

    def forward(self, input_ids, attention_mask=None):
        return self.first(self.embedding(input_ids))


def test_a_model_of_no_family_and_a_mask_that_only_a_part_of_it_sees(tmp_path):
    model, file = Wrapped().eval(), tmp_path / "covariance"
    asked = config(covariance_file=str(file), target_modules=["query", "head", "pooler.dense"], r=2)
    before = model(BATCHES[0])
    preprocess_corda(model, asked, lambda: [model(batch) for batch in BATCHES])
    store = CovarianceStore.load(file, model=model)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in BATCHES)
    assert store["bert.encoder.layer.0.attention.self.query"].count == tokens
    assert store["head"].count == store["bert.pooler.dense"].count == 21
    assert torch.allclose(get_peft_model(model, asked)(BATCHES[0]), before, atol=1e-5)


def test_a_vision_language_model_called_by_its_parts(tiny_clip_hf, tmp_path):
    file = tmp_path / "covariance"
    asked = config(covariance_file=str(file), target_modules=r".*text_model.*fc1", r=2)
    batch = {"input_ids": BATCHES[0]["input_ids"], "attention_mask": BATCHES[0]["attention_mask"]}
    preprocess_corda(tiny_clip_hf, asked, lambda: tiny_clip_hf.get_text_features(**batch))
    store = CovarianceStore.load(file, model=tiny_clip_hf)
    assert {store[name].count for name in store} == {int(batch["attention_mask"].sum())}


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(llama, method):
    llama = llama.to(torch.bfloat16)
    before = outputs(llama)
    preprocess_corda(llama, config(method), run_on(llama))
    peft_model = get_peft_model(llama, config(method))
    assert peft_model.get_parameter("base_model.model.lm_head.weight").dtype == torch.bfloat16
    assert (outputs(peft_model) - before).abs().max() < 0.03 * before.abs().max()


def test_hooked_model_and_what_is_left_without_pruning(llama):
    asked, other = config(prune_temporary_fields=False), copy.deepcopy(llama)
    preprocess_corda(llama, asked, run_on(other), other)
    assert not _hooks(other)
    layer = llama.get_submodule(site_names(llama)[0])
    x = []
    handle = layer.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    with torch.no_grad():
        run_on(llama)()
    handle.remove()
    kept = [rows[batch["attention_mask"].bool()] for rows, batch in zip(x, BATCHES, strict=True)]
    expected = sum(rows.T @ rows for rows in kept) / 3
    assert layer.sample_count == 3
    assert torch.allclose(layer.covariance_matrix, expected, rtol=1e-3, atol=1e-5)


def test_targets_as_peft_fills_them_in(llama):
    preprocess_corda(llama, config(target_modules="all-linear"), run_on(llama))
    assert hasattr(llama.model.layers[1].mlp.gate_proj, "eigens")
    assert not hasattr(llama.lm_head, "eigens")
    other = LANGUAGE["llama"]()
    preprocess_corda(other, config(target_modules=None), run_on(other))
    assert hasattr(other.model.layers[1].self_attn.v_proj, "eigens")
    assert not hasattr(other.model.layers[1].mlp.gate_proj, "eigens")


class TestFiles:
    def test_covariances_are_those_of_the_rest_of_the_package(self, llama, tmp_path):
        file = str(tmp_path / "folder" / "covariance.safetensors")
        preprocess_corda(llama, config(covariance_file=file), run_on(llama))
        store = CovarianceStore.load(file, model=llama)
        targets = ["*.down_proj"]
        plan = plan_adapter(llama, store, rank=4, targets=targets, show_progress=False)
        name = plan.sites[0].site.name
        assert torch.equal(plan.factors[name].B, llama.get_submodule(name).eigens.U_WC)

        file = tmp_path / "calibrated.safetensors"
        collect_covariance(llama, BATCHES, show_progress=False, path=file)
        preprocess_corda(llama, config(covariance_file=str(file)))
        assert torch.allclose(plan.factors[name].B, llama.get_submodule(name).eigens.U_WC)

    def test_a_cache_is_read_back_and_refused_for_anything_else(self, llama, tmp_path):
        file = tmp_path / "cache.pt"
        file.touch()  # as tempfile leaves it
        asked = config("kpm", cache_file=file)
        preprocess_corda(llama, asked, run_on(llama))
        name = site_names(llama)[0]
        before = llama.get_submodule(name).eigens
        again = copy.deepcopy(llama)
        preprocess_corda(again, asked)
        assert torch.equal(before.V_WC, again.get_submodule(name).eigens.V_WC)
        with pytest.raises(ForeignFileError, match="made with mode 'kpm', and 'ipm' is wanted"):
            preprocess_corda(llama, config("ipm", cache_file=file))
        with pytest.raises(ForeignFileError, match="a_norm None, and 10"):
            preprocess_corda(llama, asked, a_norm=10.0)
        with pytest.raises(ForeignFileError, match=r"has rank 4 where .* with rank 2"):
            preprocess_corda(llama, config("kpm", cache_file=file, r=2))
        with pytest.raises(ForeignFileError, match="no such layer"):
            preprocess_corda(llama, config("kpm", cache_file=file, target_modules=["o_proj"]))
        with pytest.raises(ForeignFileError, match="model_fingerprint"):
            preprocess_corda(LANGUAGE["llama"](), asked)

    def test_no_pickle_is_read(self, llama, tmp_path):
        torch.save({}, tmp_path / "pickle")
        for field in ("cache_file", "covariance_file"):
            with pytest.raises(ForeignFileError, match="is a pickle, as PEFT's own"):
                preprocess_corda(llama, config(**{field: str(tmp_path / "pickle")}))
        (tmp_path / "noise").write_bytes(b"x" * 99)
        for field in ("cache_file", "covariance_file"):
            with pytest.raises(ForeignFileError, match="delete it"):
                preprocess_corda(llama, config(**{field: str(tmp_path / "noise")}))

    @pytest.mark.parametrize("begin", [b"PK", b"\x80\x02"])
    def test_safetensors_whose_header_has_the_length_of_a_pickles_mark(self, tmp_path, begin):
        file, header = tmp_path / "tensors", int.from_bytes(begin, "little")
        file.write_bytes(header.to_bytes(8, "little") + b"{}".ljust(header))
        refuse_pickle(file, "cache", "delete it")

    def test_covariances_of_another_model(self, llama, tmp_path):
        file = tmp_path / "covariance"
        collect_covariance(llama, BATCHES, show_progress=False, path=file)
        with pytest.raises(ForeignFileError, match="was made from the model"):
            preprocess_corda(LANGUAGE["llama"](), config(covariance_file=str(file)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_modules": ["nothing"]}, NoSitesError, "are no nn.Linear"),
        ({"r": 99}, CordaError, "q_proj.*rank 99"),
        ({"rank_pattern": {"down_proj": 33}}, CordaError, "down_proj.*rank 33"),
    ],
)
def test_a_configuration_that_does_not_fit(llama, change, error, message):
    with pytest.raises(error, match=message):
        preprocess_corda(llama, config(**change), run_on(llama))


def test_wrong_input(llama, tiny_open_clip):
    with pytest.raises(CordaError, match="no run_model is given"):
        preprocess_corda(llama, config())
    with pytest.raises(CordaError, match="no corda_config"):
        preprocess_corda(llama, LoraConfig(target_modules=TARGETS), run_on(llama))
    with pytest.raises(UnknownNameError, match=r"unknown option 'dampin'.*Did you mean 'damping'"):
        preprocess_corda(llama, config(), run_on(llama), dampin=0.1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(CalibrationError, match="no token reached"):
        preprocess_corda(llama, config(), lambda: None)
    with pytest.raises(CordaError, match=r"out_proj' is a part of nn.MultiheadAttention"):
        preprocess_corda(tiny_open_clip, config(target_modules=["out_proj"]), lambda: None)
    with pytest.raises(CalibrationError, match="hooked_model has no layer"):
        part = nn.ModuleDict({"q_proj": nn.Linear(3, 3)})
        preprocess_corda(llama, config(), run_on(llama), part)
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers.0.self_attn.q_proj' has NaN"):
        preprocess_corda(llama, config(), run_on(llama))
    assert not _hooks(llama)
    llama.model.layers[1].mlp.down_proj.weight = nn.Parameter(
        torch.zeros(32, 48, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(CordaError, match=r"down_proj' is of torch.uint8: it is quantized"):
        preprocess_corda(llama, config(), run_on(llama))
    with pytest.raises(CordaError, match=r"up_proj' is of int8: it is quantized.*corda_vlm\.adapt"):
        refuse_quantized("up_proj", quantized("int8").model.layers[0].mlp.up_proj)


class TestInitialize:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_an_adapter_that_is_there_already(self, kind, low_cpu_mem_usage):
        model = LANGUAGE[kind]().eval()
        other, before = copy.deepcopy(model), outputs(model)
        targets = {"llama": TARGETS, "gpt2": ["c_attn", "c_fc"]}[kind]
        wide: dict[str, Any] = {"lora_alpha": 16, "target_modules": targets}
        wide["fan_in_fan_out"] = kind == "gpt2"
        preprocess_corda(other, config(**wide), run_on(other))
        expected = get_peft_model(other, config(**wide))
        fresh = LoraConfig(
            r=4, lora_alpha=16, target_modules=targets, fan_in_fan_out=wide["fan_in_fan_out"]
        )
        peft_model = get_peft_model(model, fresh, low_cpu_mem_usage=low_cpu_mem_usage)
        initialize_lora_corda_weights(peft_model, BATCHES, show_progress_bar=False)
        assert torch.allclose(outputs(peft_model), before, atol=1e-5)
        assert of(peft_model).init_lora_weights == "corda"
        ours, theirs = peft_model.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.allclose(tensor, theirs[name], atol=1e-6), name
        assert {n for n, p in peft_model.named_parameters() if p.requires_grad} == {
            n for n in ours if "lora_" in n
        }

    def test_padding_that_only_the_model_as_a_whole_is_told_of(self):
        model = Own().eval()
        other: Any = copy.deepcopy(model)
        one: dict[str, Any] = {"target_modules": ["first"]}
        preprocess_corda(other, config(**one), run_on(other))
        alone = [{"input_ids": i[m.bool()][None], "attention_mask": None} for b in BATCHES for i, m in zip(*b.values(), strict=True)]  # fmt: skip
        third: Any = copy.deepcopy(model)
        preprocess_corda(third, config(**one), run_on(third, alone))
        peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, **one))
        initialize_lora_corda_weights(peft_model, BATCHES, show_progress_bar=False)
        started = peft_model.get_parameter("base_model.model.first.lora_A.default.weight")
        assert torch.equal(started, other.first.eigens.V_WC.mT)
        assert torch.allclose(started, third.first.eigens.V_WC.mT, rtol=1e-3, atol=1e-5)

    def test_forward_fn_and_method(self, llama):
        model = get_peft_model(llama, LoraConfig(r=4, target_modules=TARGETS))
        batches = [tuple(batch.values()) for batch in BATCHES]
        initialize_lora_corda_weights(
            model,
            batches,
            lambda model, batch: model(input_ids=batch[0], attention_mask=batch[1]),
            corda_method="ipm",
            show_progress_bar=False,
        )
        assert of(model).corda_config.corda_method == "ipm"

    def test_wrong_input(self, llama):
        with pytest.raises(CordaError, match="takes a model with an adapter of PEFT"):
            initialize_lora_corda_weights(llama, BATCHES)
        model = get_peft_model(
            llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        )
        with pytest.raises(CordaError, match="init_lora_weights='pissa'; make it with"):
            initialize_lora_corda_weights(model, BATCHES)
        model = get_peft_model(
            model.unload(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        )
        with pytest.raises(CordaError, match="is no plain LoRA"):
            initialize_lora_corda_weights(model, BATCHES)
        with pytest.raises(UnknownNameError, match="unknown adapter 'defualt'"):
            initialize_lora_corda_weights(model, BATCHES, adapter_name="defualt")
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(CordaError, match="the model has 2 adapters"):
            initialize_lora_corda_weights(model, BATCHES)

    def test_a_convolution(self):
        model = get_peft_model(
            nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"])
        )
        with pytest.raises(CordaError, match="'0' is a convolution, for which PEFT has no start"):
            initialize_lora_corda_weights(model, BATCHES)


@pytest.mark.filterwarnings("ignore:.*corda_config:UserWarning:peft")
def test_a_trained_adapter_is_converted_for_the_original_model_by_peft(llama, tmp_path):
    original = copy.deepcopy(llama)
    preprocess_corda(llama, config(), run_on(llama))
    model = get_peft_model(llama, config())
    of(model).init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    converted = PeftModel.from_pretrained(original, str(tmp_path / "converted"))
    assert torch.allclose(outputs(converted), outputs(model), atol=1e-4)
