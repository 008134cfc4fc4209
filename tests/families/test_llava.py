"""Vision-language models: what their layers are called elsewhere, and how records become batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.families import detect_family
from corda_vlm.families.generative.language import language_processor
from corda_vlm.families.llava_names import rename, to_transformers
from corda_vlm.sites import find_sites
from tests.families.language_toy import IMAGE, PROCESSORS, make, picture, with_processor

# transformers 5, transformers 4 (files on the hub), the original repository
NAMES = [
    (
        "model.language_model.layers.31.self_attn.q_proj",
        "language_model.model.layers.31.self_attn.q_proj",
        "model.layers.31.self_attn.q_proj",
    ),
    (
        "model.language_model.layers.0.mlp.down_proj.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ),
    (
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.embed_tokens.weight",
    ),
    ("model.language_model.norm.weight", "language_model.model.norm.weight", "model.norm.weight"),
    ("lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"),
    (
        "model.vision_tower.encoder.layers.5.self_attn.q_proj.bias",
        "vision_tower.vision_model.encoder.layers.5.self_attn.q_proj.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.5.self_attn.q_proj.bias",
    ),
    (
        "model.vision_tower.pre_layrnorm.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
    ),
    (
        "model.multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.mm_projector.0.weight",
    ),
    (
        "model.multi_modal_projector.linear_2.bias",
        "multi_modal_projector.linear_2.bias",
        "model.mm_projector.2.bias",
    ),
    ("model.image_newline", "image_newline", "model.image_newline"),
]
KINDS = ("transformers", "transformers4", "llava")


@pytest.mark.parametrize("to", range(3))
@pytest.mark.parametrize("of", range(3))
def test_names_are_mapped_both_ways(of, to):
    names = [row[of] for row in NAMES]
    assert rename(names, KINDS[to]) == dict(zip(names, (row[to] for row in NAMES), strict=True))


def test_names_of_models_between_the_versions():
    between = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    assert to_transformers(between) == "model.vision_tower.encoder.layers.0.mlp.fc1"


def test_names_that_cannot_be_mapped():
    assert to_transformers("model.visual.blocks.0.attn.qkv") == "model.visual.blocks.0.attn.qkv"
    with pytest.raises(UnknownNameError, match="unknown naming 'llava1'"):
        rename([], "llava1")
    both = ["model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"]
    with pytest.raises(CordaError, match="would both be called"):
        rename(both, "transformers")


def test_the_model_and_its_file_are_called_as_the_table_says(tmp_path):
    from safetensors import safe_open

    model: Any = make("llava")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert set(rename(keys, "transformers").values()) == set(model.state_dict())
    for name in ("transformers4", "llava"):
        there = rename(model.state_dict(), name)
        assert rename(there.values(), "transformers") == {new: old for old, new in there.items()}


def test_towers_do_not_leak():
    sites = {site.name: site for site in find_sites(make("llava"))}
    vision = sites["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
    language = sites["model.language_model.layers.0.self_attn.q_proj"]
    assert (vision.tower, language.tower) == ("vision", "language")
    assert vision.stream != language.stream
    assert len({site.stream for site in sites.values()}) == 4 * 2 + 2 + 4 * 2


def test_a_language_model_that_is_not_known_is_refused():
    import transformers as t

    from tests.families.language_toy import VISION

    text = t.BioGptConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = t.LlavaForConditionalGeneration(
        t.LlavaConfig(text_config=text, vision_config=t.CLIPVisionConfig(**VISION))
    )
    with pytest.raises(CordaError, match=r"its language model is a 'biogpt'.*Known: llama"):
        find_sites(model)


# ------------------------------------------------------------------ records and batches


@pytest.fixture(scope="module")
def toys():
    made = {}

    def get(name):
        if name not in made:
            toy = with_processor(name)
            made[name] = toy.model, language_processor(toy.model, toy.whole.tokenizer, toy.whole)
        return made[name]

    return get


def sample(processor, answer="A cat .", images=1, size=(32, 32)):
    places = f"{processor.image_token} " * images
    text = f"{places}USER : What is this ? ASSISTANT : {answer}"
    return processor.encode(
        text,
        [picture(*size) for _ in range(images)],
        responses=[(text.index(answer), len(text))],
    )


def learnt(processor, labels):
    return processor.tokenizer.decode(labels[labels != -100]).replace(" </s>", "")


@pytest.mark.parametrize("name", PROCESSORS)
def test_records_of_every_kind_make_one_batch(toys, name):
    model, processor = toys(name)
    samples = [
        sample(processor, "A cat .", size=(60, 32)),
        sample(processor, "dog", images=0),
        sample(processor, "red blue", size=(32, 70)),
    ]
    answers = ["A cat .", "dog", "red blue"]
    for one, answer in zip(samples, answers, strict=True):
        assert one["input_ids"].shape == one["attention_mask"].shape == one["labels"].shape
        assert learnt(processor, one["labels"]) == answer
    right, left = processor.collate(samples), processor.collate(samples, padding_side="left")
    for batch, at in ((right, 0), (left, -1)):
        assert batch["attention_mask"][:, at].all()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        for row, answer in enumerate(answers):
            assert learnt(processor, batch["labels"][row]) == answer
    assert right["input_ids"].dtype == right["labels"].dtype == torch.long
    with torch.no_grad():
        assert model(**right).loss.isfinite()
        found = model.generate(
            **{key: value for key, value in left.items() if key != "labels"},
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
        )
    assert found.shape == (3, left["input_ids"].shape[1] + 2)
    masks = detect_family(model).need_generative(model).choose_tokens(model, "image")(right)
    assert (right["input_ids"][masks["language"]] == processor.image_token_id).all()
    assert not masks["language"][1].any()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_padding_changes_no_answer(toys, name):
    model, processor = toys(name)
    samples = [sample(processor, "dog", images=0), sample(processor, "A cat .", size=(60, 32))]
    with torch.no_grad():
        batch = processor.collate(samples)
        together = model(**batch).logits
        for row, one in enumerate(samples):
            alone = model(**processor.collate([one])).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-3, atol=1e-4)


def test_several_turns_and_images(toys):
    _, processor = toys("llava")
    text = "<image> USER : What ? ASSISTANT : dog USER : <image> this ? ASSISTANT : A cat"
    spans = [(text.index(word), text.index(word) + len(word)) for word in ("dog", "A cat")]
    one = processor.encode(text, [picture(), picture(40, 32)], responses=spans)
    assert learnt(processor, one["labels"]) == "dog A cat"
    assert (one["input_ids"] == processor.image_token_id).sum() == 2 * 16
    assert one["pixel_values"].shape == (2, 3, 32, 32)
    assert "labels" not in processor.encode(text, [picture(), picture()])


def test_what_does_not_match_is_named(toys):
    _, processor = toys("llava")
    assert processor.takes_images
    assert (processor.image_token, processor.context) == ("<image>", 128)
    for text, images in (("<image> what", 0), ("what", 1), ("<image> <image>", 1)):
        with pytest.raises(DataError, match=rf"{images} images, and \d places for them"):
            processor.encode(text, [picture()] * images)
    for span in ((2, 2), (-1, 2), (3, 99)):
        with pytest.raises(DataError, match="is empty, or not within it"):
            processor.encode("What is this", responses=[span])
    with pytest.raises(CordaError, match="expected 'left' or 'right'"):
        processor.collate([], padding_side="both")
    with pytest.raises(DataError, match="one answer at the end"):
        _, paligemma = toys("paligemma")
        paligemma.encode("<image> What dog A", [picture()], responses=[(13, 16)])


def test_single_images(toys):
    _, llava = toys("llava")
    assert llava.image(picture(50, 40)).shape == (3, 32, 32)
    assert llava.image_size == (32, 32)
    _, cut = toys("llava_next")
    with pytest.raises(CordaError, match=r"cuts images into pieces.*processor\.encode"):
        cut.image(picture())


def test_a_batch_without_images_runs(toys):
    model, processor = toys("llava")
    batch = processor.collate([sample(processor, images=0)])
    assert "pixel_values" not in batch
    output: Any = detect_family(model).forward(model, batch)
    assert output.last_hidden_state.shape[:2] == batch["input_ids"].shape
    with pytest.raises(DataError, match=r"takes 'input_ids'; the batch has: pixel_values"):
        detect_family(model).forward(model, {"pixel_values": torch.zeros(1)})


def test_there_are_no_embeddings():
    model: Any = make("llava")
    family = detect_family(model)
    with pytest.raises(CordaError, match="generates text and has no embeddings"):
        family.need_contrastive(model)
    assert family.need_generative(model) is family.generative
    assert model.config.image_token_id == IMAGE
