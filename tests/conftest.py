"""Fixtures: tiny models of the real classes with random weights, for shapes and round trips.

Claims about learning and forgetting are tested on the trained models of `model_zoo/`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell without job control starts background processes with Ctrl-C ignored, and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data named by `CORDA_VLM_DATA`; tests that want it are skipped, visibly, without it."""
    folder = os.environ.get("CORDA_VLM_DATA")
    if not folder:
        pytest.skip(
            "CORDA_VLM_DATA is not set: this test wants the real data sets beside the repository"
        )
    path = Path(folder)
    assert path.is_dir(), f"CORDA_VLM_DATA={folder} is not a folder"
    return path


@pytest.fixture
def tiny_clip_hf():
    """A transformers `CLIPModel`: 2 layers a tower, width 32, 32-pixel images, patch 8."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 99,
                     "bos_token_id": 98, "pad_token_id": 0},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    return CLIPModel(config).eval()


@pytest.fixture
def tiny_siglip():
    """A transformers `SiglipModel`: 2 layers a tower, width 32, with the attention-pooling head."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(
        text_config={"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "max_position_embeddings": 12},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    return SiglipModel(config).eval()


@pytest.fixture
def tiny_open_clip():
    """An open_clip `CLIP`: 2 layers a tower, packed `in_proj_weight` attention."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        embed_dim=24,
        vision_cfg=CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
        text_cfg=CLIPTextCfg(context_length=12, vocab_size=100, width=32, heads=2, layers=2),
    ).eval()
