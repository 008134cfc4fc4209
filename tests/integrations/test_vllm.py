"""vLLM's own checks and its own loader on what is exported for it. Its engine needs a GPU and is not run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from corda_vlm import export_adapter
from corda_vlm.adapter.exchange.serving import VLLM_RANKS
from tests.integrations.served import learned, products

pytestmark = [pytest.mark.unchecked, pytest.mark.slow]
LIVE = Path(__file__).with_name("vllm_live.py")


def test_its_loader_reads_the_change(tool, smollm2_4, tmp_path, measured):
    """PEFTHelper.validate_legal takes an export, LoRAModel reads the change that it was exported with, at the rank of the command"""
    model = learned(smollm2_4)
    folder = export_adapter(model, tmp_path / "lora", serve="vllm", source=smollm2_4)
    (command,) = json.loads((folder / "corda_export.json").read_text())["serve_commands"]
    words = shlex.split(command)
    assert words[2] == str(smollm2_4)
    rank = words[words.index("--max-lora-rank") + 1]
    tool.run(LIVE, folder, rank, tmp_path / "changes.safetensors", cwd=tmp_path)
    theirs, ours = load_file(tmp_path / "changes.safetensors"), products(model)
    assert theirs.keys() == ours.keys()
    apart = max(float((theirs[n] - ours[n]).abs().max() / ours[n].abs().max()) for n in ours)
    assert apart < 1e-5
    below = VLLM_RANKS[VLLM_RANKS.index(int(rank)) - 1]
    with pytest.raises(AssertionError, match=f"is greater than max_lora_rank {below}"):
        tool.run(LIVE, folder, str(below), tmp_path / "refused.safetensors", cwd=tmp_path)
    measured(
        f"{len(ours)} layers within {apart:.0e}; --max-lora-rank {rank}, and {below} is refused"
    )


def test_what_we_refuse_it_refuses(tool, smollm2_4, tmp_path):
    """modules_to_save, which serve="vllm" refuses, is refused by validate_legal"""
    model = learned(smollm2_4, modules_to_save=("model.norm",))
    folder = export_adapter(model, tmp_path / "lora")  # not for vLLM
    with pytest.raises(AssertionError, match="only supports modules_to_save being either None"):
        tool.run(LIVE, folder, "64", tmp_path / "changes.safetensors", cwd=tmp_path)


def test_ranks_are_those_that_it_knows(tool, tmp_path):
    """the ranks that --max-lora-rank takes are those of `corda_vlm.adapter.exchange.serving`"""
    code = "from typing import get_args; from vllm.config.lora import MaxLoRARanks; print('ranks', *get_args(MaxLoRARanks))"
    printed = tool.run("-c", code, cwd=tmp_path)
    (line,) = [line for line in printed.splitlines() if line.startswith("ranks ")]
    assert tuple(map(int, line.split()[1:])) == VLLM_RANKS
    assert torch.tensor(VLLM_RANKS).diff().gt(0).all()
