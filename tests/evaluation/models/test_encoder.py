"""The encoder: open_clip's zero-shot classifier for any family, made once for weights that do not change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip import build_zero_shot_classifier

from corda_vlm.evaluation.models.encoder import Cache, Encoder
from corda_vlm.families import detect_family

NAMES = ["blue whale", "green tree", "red"]


TEMPLATES = ["a photo of a {}", "{}", "the {} thing"]


def encoder_of(model, processor, **options) -> Encoder:
    return Encoder(model, detect_family(model), processor, **options)


def test_the_classifier_is_open_clips(tiny_open_clip, tiny_processor) -> None:
    ours = encoder_of(tiny_open_clip, tiny_processor, batch_size=4).classifier(NAMES, TEMPLATES)
    theirs = build_zero_shot_classifier(
        tiny_open_clip, lambda texts: tiny_processor.text(texts)["input_ids"], NAMES, TEMPLATES
    )
    assert ours.shape == (24, 3)
    torch.testing.assert_close(ours, theirs)


def test_the_classifier_of_a_transformers_model(tiny_clip_hf, tiny_processor) -> None:
    ours = encoder_of(tiny_clip_hf, tiny_processor).classifier(NAMES, TEMPLATES)
    for index, name in enumerate(NAMES):
        batch = tiny_processor.text([template.format(name) for template in TEMPLATES])
        with torch.no_grad():
            vectors = F.normalize(
                detect_family(tiny_clip_hf)
                .need_contrastive(tiny_clip_hf)
                .encode_text(tiny_clip_hf, batch),
                dim=-1,
            )
        torch.testing.assert_close(ours[:, index], F.normalize(vectors.mean(0), dim=0))


def test_the_text_side_is_encoded_again_only_if_it_changed(tiny_open_clip, tiny_processor) -> None:
    cache = Cache()

    def build() -> torch.Tensor:
        return encoder_of(tiny_open_clip, tiny_processor, cache=cache).classifier(NAMES, TEMPLATES)

    first = build()
    with torch.no_grad():
        tiny_open_clip.visual.proj.mul_(2)
    assert build() is first, "only the vision tower changed"
    with torch.no_grad():
        tiny_open_clip.transformer.resblocks[0].mlp.c_fc.weight[0, 0] += 1e-2
    changed = build()
    assert changed is not first
    assert not torch.equal(changed, first)
