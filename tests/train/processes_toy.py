"""What each of two processes of `test_distributed` does; run as a script, which writes what happened as JSON.

python processes_toy.py OUTPUT     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun does
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from corda_vlm.anchor import Anchor
from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.distributed import agree as distributed
from corda_vlm.errors import CordaError
from corda_vlm.methods import prepare_method
from corda_vlm.sites import find_sites
from corda_vlm.train import AnchorMixin
from corda_vlm.train.terms.start_decay import StartDecay


def llama(layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


class Tokens(Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(3, 32, (64, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Anchored(AnchorMixin, Trainer):
    pass


def batches(seed: int, count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 32, (8, 8), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def labeled(seed: int) -> list[dict[str, torch.Tensor]]:
    """Knowledge to distill from."""
    return [{**batch, "labels": batch["input_ids"]} for batch in batches(seed)]


def collected(model, seed: int, **options) -> CovarianceStore:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sites = find_sites(model)
        return collect_covariance(model, batches(seed), sites, show_progress=False, **options)


def trainer_of(folder: Path, batch: int, method: str = "lora", accumulation: int = 1, **options):
    torch.manual_seed(2)  # of the adapter's start
    lora = {"rank": 2, "roles": "q,v,down"}
    model = prepare_method(method, llama(), **(lora if method == "lora" else {}))
    return Anchored(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=3, per_device_train_batch_size=batch, learning_rate=0.5, optim="sgd",
            gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **options,
        ),
        train_dataset=Tokens(),
    )  # fmt: skip


def trained(folder: Path, store, batch: int, method: str = "lora", accumulation: int = 1) -> dict:
    """What is trained after three steps with a strong anchor, or with all other terms, and a digest of its bits."""
    trainer = trainer_of(folder, batch, "full" if method == "terms" else method, accumulation)
    if method == "terms":
        trainer.distill_from(labeled(3), 3.0)
        trainer.stay_near(2.0)
        trainer.penalize("start_decay", StartDecay(trainer.model), 0.1)
    else:
        trainer.anchor_to(store, 3.0)
    trainer.train()
    found = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in found.values())).hexdigest()
    values = torch.cat([p.flatten() for p in found.values()]).tolist()
    names = [term.name for term in trainer.terms]
    losses = [[e[name] for name in names] for e in trainer.state.log_history if names[0] in e]
    return {"digest": digest, "values": values, "terms": losses}


def said(call) -> str:
    """The message of the `CordaError` that `call` ends with."""
    try:
        call()
    except CordaError as error:
        return str(error)
    return ""


def main(output: Path) -> None:
    distributed.TIMEOUT = timedelta(seconds=120)
    rank = int(os.environ["RANK"])
    found: dict = {"no group": said(lambda: collected(llama(), 3))}
    plain = trainer_of(output, 4, ddp_backend="gloo")  # this makes the process group
    model = llama()
    store = collected(model, 3)
    for method, accumulation in (("lora", 1), ("lora", 2), ("full", 1), ("terms", 1)):
        key = f"{method} {accumulation}"
        found[key] = trained(output, store, 4 // accumulation, method, accumulation)

    found["shards"] = said(lambda: collected(model, 3 + rank))
    own = output / f"own{rank}.safetensors"
    found["own paths"] = said(lambda: collected(model, 3, path=own))
    finished = output / "finished.safetensors"
    if rank == 0:
        store.save(finished)
    torch.distributed.barrier()
    found["finished"] = said(lambda: collected(model, 3, path=finished))

    # ranks that calibrated alone
    distributed.has_group = lambda: False
    other = collected(model, 3 + rank)
    distributed.has_group = torch.distributed.is_initialized
    found["other matrices"] = said(lambda: trained(output, other, 4))
    sketch, Anchor.sketch = Anchor.sketch, lambda self: [0.0]
    found["unlike in secret"] = trained(output, other, 4)
    Anchor.sketch = sketch
    wrong = store if rank == 0 else torch.zeros(3)
    found["wrong on one"] = said(lambda: plain.anchor_to(wrong, 1.0))  # type: ignore[arg-type]

    found["other records"] = said(lambda: plain.distill_from(labeled(3 + rank), 1.0))
    found["other weights"] = said(lambda: plain.stay_near(1.0 + rank))
    if rank == 0:
        found["elsewhere"] = said(lambda: plain.stay_near(1.0))
    else:
        found["elsewhere"] = said(lambda: collected(model, 3))
    torch.distributed.barrier()

    fsdp = trainer_of(output, 4, ddp_backend="gloo", fsdp="full_shard")
    found["fsdp"] = said(lambda: fsdp.anchor_to(store, 0.0))

    distributed.TIMEOUT = distributed._WARN_AFTER = timedelta(seconds=1)
    if rank == 0:
        found["absent"] = said(lambda: distributed.gathered("the dinner", "here"))
    torch.distributed.barrier()
    (output / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
