"""Train shapes-llava: a LLaVA of seven million parameters that answers easy-VQA, on one CPU thread.

::

    python model_zoo/shapes-llava/train.py --out runs/shapes-llava

The vision tower starts from emoji-clip's, the projector and the language model from nothing, and all of
it is trained on the answers. What makes that affordable on a CPU:

* three quarters of the images are drawn anew (shapes.py), so that 4,000 are not learnt by heart, and
  half of the questions are not yes/no: easy-VQA's usual three yes/no questions in four, mostly about
  what is not there, are answered well without looking;
* one sequence holds an image once and several questions, each of which sees the image and itself alone,
  at the positions it would have by itself: the loss of each is what the plain model gives;
* the output layer runs where an answer is to be learnt, and nowhere else.

Of the official images the 'train' split is trained on, and the 'val' split alone is looked at.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import platform
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from shapes import (
    COLOURS,
    SHAPES,
    SIZE,
    Scene,
    draw_scene,
    is_open,
    open_questions,
    paint,
    yes_no_questions,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from corda_vlm.precision import takes_bf16

HERE = Path(__file__).resolve().parent
EMOJI_CLIP = HERE.parent / "emoji-clip"
PAD, START, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
Pair = tuple[str, str]  # question and answer
VOCABULARY = 1024
CONTEXT = 512
LANGUAGE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
# LLaVA-1.5's, which takes a content of parts and one of plain text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# So that new tasks find more than single letters; emoji-clip's labels and tags are the other plain English.
PLAIN_ENGLISH = """
Which digit is this? What number do you see in the picture? It is a zero, one, two, three, four, five, six, seven,
eight, nine or ten. How many objects are there? There are some of them on the left, and others on the right side.
What does this photo show? Who is in this image, and where was it taken? When and why did that happen? Please answer
the question with a single word or phrase. Describe the image in one sentence. Is it large or small, light or dark,
round or square, above or below, inside or outside, the same or different? This was not what they said it would be,
because it has been made by people who had been there before. Yes, you can have more than one if you want to. No, I do
not think so. Read the letter or the word that is written here. Tell me which class, kind, name, type or category it
belongs to: an animal, a plant, a person, a vehicle, a building, food, furniture, clothing, a tool, a sign, a symbol.
white orange purple pink cyan magenta silver gold first second third last none all both few many other another each
0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 30 40 50 60 70 80 90 100
"""


@dataclass(frozen=True)
class Stage:
    """What is asked, and how fast the language model learns, from one step on.

    Attributes:
        open_share: of questions that are not yes/no.
        there_share: of the yes/no questions about drawn images, those that name what is there.
        not_share: of the same, those with a "no" or "not".
        colour_share: of the same, those about a colour; None: as the questions have it.
    """

    start: int
    open_share: float
    there_share: float = 0.5
    not_share: float = 0.5
    colour_share: float | None = None
    learning_rate: float = 1e-3


# Each was set while the training ran, by what the validation split said of the one before.
STAGES = (
    Stage(0, open_share=1.0),  # nothing that can be answered without looking
    Stage(
        400, open_share=0.5
    ),  # a parity: neither "not" nor what is there tells anything by itself
    Stage(500, 0.5, there_share=0.3),  # learns "not"
    Stage(1000, 0.3, there_share=0.4, not_share=0.2),  # learns what is there, and loses it again
    Stage(1500, 0.3, there_share=0.4, not_share=0.2, learning_rate=4e-4),  # keeps it, for colours
    Stage(1750, 0.3, there_share=0.4, not_share=0.2, colour_share=0.5, learning_rate=4e-4),
    # Eight colours have most of the questions, but are not harder than three shapes.
    Stage(2000, 0.1, not_share=0.1, colour_share=0.15, learning_rate=4e-4),  # learns shapes
    Stage(2250, 0.25, there_share=0.4, not_share=0.4, colour_share=0.4, learning_rate=4e-4),  # all
)


def stage_of(step: int) -> Stage:
    """The last that has begun."""
    return [stage for stage in STAGES if stage.start <= step][-1]


@dataclass(frozen=True)
class Options:
    """What decides the result, beside `STAGES`. Written beside the weights."""

    steps: int = 2750
    # The rates rise, follow the stages, and from `cooldown_from` on go straight to zero at `steps`.
    cooldown_from: int = 2350
    warmup_steps: int = 150
    images_per_batch: int = 32
    questions_per_image: int = 4
    official_share: float = 0.25
    # Of the vision tower and the projector. At the language model's rate noise undoes what the tower knows of
    # colours long before they are asked for.
    vision_learning_rate: float = 2e-4
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Official:
    """One split: images (n, 3, 64, 64) uint8, and (question, answer) pairs of each."""

    images: Tensor
    questions: list[list[Pair]]


# ---------------------------------------------------------------------------------------------- data


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(64, 64, 3) -> (3, 64, 64), uint8."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def normalise(images: Tensor) -> Tensor:
    """uint8 -> float of mean 0.5 and deviation 0.5, as the image processor does."""
    return images.float() / 127.5 - 1.0


def read_official(path: Path, split: str) -> Official:
    """The images and questions of one split of data/easy_vqa.parquet."""
    images, questions = [], []
    for row in pq.read_table(path).to_pylist():
        if row["split"] == split:
            images.append(
                to_tensor(np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")))
            )
            pairs = json.loads(row["qa_json"])
            questions.append([(pair["question"], pair["answer"]) for pair in pairs])
    if not images:
        raise ValueError(f"{path}: no images of split {split!r}")
    return Official(torch.stack(images), questions)


def every_pair() -> list[Pair]:
    """Every question of easy-VQA with every answer that it may have, sorted."""
    pairs: set[Pair] = set()
    for shape in SHAPES:
        for colour in COLOURS:
            pairs |= {*open_questions(shape, colour)}
            for negated in (False, True):
                pairs |= {*yes_no_questions(shape, colour, negated)}
    return sorted(pairs)


# ----------------------------------------------------------------------------------------- tokenizer


def render(question: str, answer: str = "", image: str = f"{IMAGE}\n") -> str:
    """What `CHAT_TEMPLATE` makes of one question about one image."""
    return f"USER: {image}{question} ASSISTANT:" + (f" {answer}{END}" if answer else "")


def plain_english() -> list[str]:
    """Words that easy-VQA does not have: the text above, and what emoji are called."""
    names: set[str] = set()
    for path in sorted((EMOJI_CLIP / "data").glob("*.parquet")):
        if path.stem == "openmoji":  # CC BY-SA
            continue
        table = pq.read_table(path, columns=["label", "tags"])
        names |= {row["label"] + " " + " ".join(row["tags"]) for row in table.to_pylist()}
    return [PLAIN_ENGLISH] * 20 + sorted(names)


def train_tokenizer() -> Any:
    """A byte-level BPE, as GPT-2's and Llama 3's, that adds the start of the text."""
    bpe = Tokenizer(models.BPE())
    # Digits one by one, so that each number is read the same way.
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Often enough that each of easy-VQA's words is one token.
    asked = [render(question, answer).replace(END, "") for question, answer in every_pair()] * 100
    bpe.train_from_iterator([*asked, *plain_english()], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A",
        pair=f"{START} $A {START}:1 $B:1",
        special_tokens=[(START, bpe.token_to_id(START))],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# --------------------------------------------------------------------------------------------- model


def vision_of_emoji_clip() -> Any:
    """emoji-clip's vision tower as transformers' `CLIPVisionModel`."""
    from corda_vlm.families import load_model

    clip: Any = load_model("emoji-clip-hf").model
    tower = transformers.CLIPVisionModel(clip.config.vision_config)
    tower.load_state_dict(clip.vision_model.state_dict())
    return tower


def build_model(tokenizer: Any, seed: int) -> Any:
    """A `LlavaForConditionalGeneration` whose vision tower is emoji-clip's."""
    torch.manual_seed(seed)
    tower = vision_of_emoji_clip()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=transformers.LlamaConfig(
            **LANGUAGE,
            **ids,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-1,  # the tower is trained, so its last block is as good as any
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **ids,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


def build_processor(tokenizer: Any, config: Any) -> Any:
    """Image processor, tokenizer and chat template as one."""
    images = transformers.CLIPImageProcessor(
        do_resize=True,
        size={"height": SIZE, "width": SIZE},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=False,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" leaves out
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def export(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write what `from_pretrained` reads, weights in float16; whole or not at all."""
    temporary = directory.with_name(directory.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.float16).save_pretrained(temporary)
    build_processor(tokenizer, model.config).save_pretrained(temporary)
    model.to(torch.float32).load_state_dict(kept)
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner may read
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


# --------------------------------------------------------------------------- several questions at once


@dataclass
class Packing:
    """How questions about one image share a sequence: the image first, then segments of one length."""

    tokenizer: Any
    image_tokens: int
    head: Tensor = field(init=False)  # (P,) what precedes the question
    length: int = field(init=False)  # of a segment

    def __post_init__(self) -> None:
        places = IMAGE * self.image_tokens + "\n"
        self.places = places
        opening = f"USER: {places}"
        self.head = torch.tensor(self.tokenizer(opening)["input_ids"])
        self.first = int((self.head == self.tokenizer.convert_tokens_to_ids(IMAGE)).nonzero()[0])
        self.cache: dict[Pair, tuple[Tensor, Tensor]] = {}
        lengths = []
        for question, answer in every_pair():
            ids, learnt = self._encode(question, answer)
            lengths.append(len(ids))
            self.cache[question, answer] = ids, learnt
        self.length = max(lengths)
        for pair, (ids, learnt) in self.cache.items():
            spare = self.length - len(ids)
            pad = self.tokenizer.pad_token_id
            self.cache[pair] = F.pad(ids, (0, spare), value=pad), F.pad(learnt, (0, spare))

    def _encode(self, question: str, answer: str) -> tuple[Tensor, Tensor]:
        whole = self.tokenizer(render(question, answer, self.places))["input_ids"]
        asked = self.tokenizer(render(question, image=self.places))["input_ids"]
        head = self.head.tolist()
        if whole[: len(asked)] != asked or asked[: len(head)] != head:
            raise ValueError(f"{question!r}: a token crosses from the image or into the answer")
        learnt = torch.zeros(len(whole), dtype=torch.bool)
        learnt[len(asked) :] = True
        return torch.tensor(whole[len(head) :]), learnt[len(head) :]

    def segments(self, pairs: list[list[Pair]]) -> tuple[Tensor, Tensor]:
        """Ids and which are to be learnt, (B, questions * length)."""
        rows = [[self.cache[pair] for pair in own] for own in pairs]
        ids = torch.stack([torch.cat([one for one, _ in row]) for row in rows])
        return ids, torch.stack([torch.cat([one for _, one in row]) for row in rows])

    def frame(self, questions: int) -> tuple[Tensor, Tensor]:
        """Attention mask (1, 1, L, L), 0 or minus infinity, and positions (1, L), L with the head.

        Padding stands at the end of a segment, where no token that counts looks back at it.
        """
        heads = len(self.head)
        own = torch.arange(questions).repeat_interleave(self.length)
        segment = torch.cat([torch.full((heads,), -1), own])  # (L,)
        order = torch.arange(len(segment))
        seen = (segment[:, None] == segment) | (segment == -1)
        seen = seen & (order[:, None] >= order)
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        positions = torch.cat(
            [torch.arange(heads), heads + torch.arange(self.length).repeat(questions)]
        )
        return mask[None, None], positions[None]


def answer_logits(
    model: Any, packing: Packing, pixels: Tensor, ids: Tensor, learnt: Tensor, frame: Any
) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) where a learnt token comes next, and those tokens (n,), in order."""
    inner, (mask, positions) = model.model, frame
    with torch.autocast("cpu", torch.bfloat16, enabled=takes_bf16("auto", "cpu")):
        features = torch.stack(list(inner.get_image_features(pixels).pooler_output))  # (B, 16, D)
        embed = inner.get_input_embeddings()
        head = embed(packing.head).expand(len(ids), -1, -1)  # (B, P, D)
        after = packing.first + packing.image_tokens
        parts = [head[:, : packing.first], features.to(head.dtype), head[:, after:], embed(ids)]
        hidden = inner.language_model(
            inputs_embeds=torch.cat(parts, dim=1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state  # (B, L, D)
        before = hidden[:, len(packing.head) :][:, :-1][learnt[:, 1:]]
        return model.lm_head(before).float(), ids[:, 1:][learnt[:, 1:]]


# ------------------------------------------------------------------------------------------ training


class Batches:
    """Batch number i is a function of the seed and i alone, so a resumed run sees the same ones."""

    def __init__(self, official: Official, packing: Packing, options: Options) -> None:
        self.official, self.packing, self.options = official, packing, options

    def _ask_drawn(self, draw: random.Random, scene: Scene, stage: Stage) -> list[Pair]:
        asked = []
        for _ in range(self.options.questions_per_image):
            if draw.random() < stage.open_share:
                asked.append(draw.choice(open_questions(scene.shape, scene.colour)))
                continue
            there = draw.random() < stage.there_share
            negated = draw.random() < stage.not_share
            kind = [
                (question, answer)
                for question, answer in yes_no_questions(scene.shape, scene.colour, negated)
                if (answer == "yes") == (there != negated)
            ]
            if stage.colour_share is not None:
                coloured = draw.random() < stage.colour_share
                kind = [pair for pair in kind if (" shape" in pair[0]) == coloured]
            asked.append(draw.choice(kind))
        return asked

    def _ask_official(self, draw: random.Random, own: list[Pair], share: float) -> list[Pair]:
        asked = []
        for _ in range(self.options.questions_per_image):
            wanted = draw.random() < share
            kind = [pair for pair in own if is_open(pair[1]) == wanted]
            asked.append(draw.choice(kind or own))
        return asked

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, 64, 64) normalised, ids and learnt (B, questions * length)."""
        draw = random.Random(self.options.seed * 1_000_003 + step)
        count = self.options.images_per_batch
        stage = stage_of(step)
        images, pairs = [], []
        for _ in range(round(count * self.options.official_share)):
            row = draw.randrange(len(self.official.images))
            images.append(self.official.images[row])
            pairs.append(self._ask_official(draw, self.official.questions[row], stage.open_share))
        while len(images) < count:
            scene = draw_scene(draw)
            images.append(to_tensor(paint(scene)))
            pairs.append(self._ask_drawn(draw, scene, stage))
        pixels = augment(torch.stack(images), torch.Generator().manual_seed(draw.getrandbits(32)))
        return pixels, *self.packing.segments(pairs)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, a quarter brighter or darker, with noise; uint8 -> normalised."""
    count = len(images)
    mirrored = torch.rand(count, generator=generator) < 0.5
    pixels = normalise(images)
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    changed = (torch.rand(count, generator=generator) < 0.25).float()[:, None, None, None]
    light = 0.06 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = 0.03 * torch.randn(pixels.shape, generator=generator)
    return (pixels + changed * (light + noise)).clamp(-1, 1)


@torch.no_grad()
def validate(model: Any, packing: Packing, official: Official, questions: int) -> dict[str, float]:
    """The share of the official questions answered right, all and open ones.

    An answer is right if each of its tokens, the end included, is the likeliest: so it would be said.
    """
    model.eval()
    rows, asked = [], []
    for row, own in enumerate(official.questions):
        for at in range(0, len(own), questions):
            some = own[at : at + questions]
            rows.append(row)
            asked.append(some + [some[-1]] * (questions - len(some)))
    frame = packing.frame(questions)
    right, unlike = [], []
    for at in range(0, len(rows), 128):
        own = asked[at : at + 128]
        ids, learnt = packing.segments(own)
        pixels = normalise(official.images[rows[at : at + 128]])
        logits, wanted = answer_logits(model, packing, pixels, ids, learnt, frame)
        hit = torch.zeros(learnt.shape, dtype=torch.bool)
        hit[:, 1:][learnt[:, 1:]] = logits.argmax(-1) == wanted
        hit = (hit == learnt).view(len(own), questions, -1).all(-1)  # (B, questions)
        for pairs, hits in zip(own, hit.tolist(), strict=True):
            fresh = dict(zip(pairs, hits, strict=True))  # drops the repeated ones
            right += fresh.values()
            unlike += [is_open(answer) for _, answer in fresh]
    model.train()
    found, kind = torch.tensor(right).float(), torch.tensor(unlike)
    return {
        "val_all": found.mean().item(),
        "val_open": found[kind].mean().item(),
        "val_yes_no": found[~kind].mean().item(),
    }


def rate_at(step: int, options: Options) -> float:
    """The share of the learning rates: up, level, and straight to zero at the end."""
    warm = min(1.0, (step + 1) / options.warmup_steps)
    left = (options.steps - step) / max(1, options.steps - options.cooldown_from)
    return warm * min(1.0, left)


def save_checkpoint(out: Path, progress: dict[str, Any], model: Any, optimizer: Any) -> None:
    """Write everything to a new folder and rename it: a kill leaves the old or the new, never half."""
    temporary, final, old = out / "checkpoint.part", out / "checkpoint", out / "checkpoint.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "progress.json").write_text(json.dumps(progress))
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(out: Path, model: Any, optimizer: Any) -> tuple[int, float]:
    """Resume from `out`, also when the kill came between the two renames."""
    folder = out / "checkpoint"
    if not folder.exists():
        folder = out / "checkpoint.old"
    if not folder.exists():
        return 0, 0.0
    model.load_state_dict(load_file(folder / "model.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    progress = json.loads((folder / "progress.json").read_text())
    return int(progress["step"]), float(progress["seconds"])


def train(options: Options, data: Path, out: Path, threads: int) -> None:
    """Train, resuming from `out` if it has a checkpoint, and export the model to `out/model`."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer, options.seed).train()
    packing = Packing(tokenizer, model.config.image_seq_length)
    batches = Batches(read_official(data, "train"), packing, options)
    val = read_official(data, "val")
    kinds = [(vision, decays) for vision in (False, True) for decays in (False, True)]
    groups = []
    for vision, decays in kinds:
        chosen = [
            parameter
            for name, parameter in model.named_parameters()
            if ("vision" in name or "projector" in name) == vision
            and (parameter.ndim >= 2 and "embed" not in name) == decays
        ]
        groups.append({"params": chosen, "weight_decay": options.weight_decay if decays else 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    step, seconds = load_checkpoint(out, model, optimizer)
    stages = {"stages": [asdict(stage) for stage in STAGES]}
    machine = {"machine": f"{platform.system()} {platform.machine()}", "threads": threads}
    (out / "options.json").write_text(
        json.dumps(asdict(options) | stages | machine, indent=2) + "\n"
    )
    frame = packing.frame(options.questions_per_image)
    per_step = options.images_per_batch * options.questions_per_image
    parameters = list(model.parameters())
    started, marked, recent = time.monotonic() - seconds, time.monotonic(), []
    with (out / "log.jsonl").open("a") as log, sdpa_kernel(SDPBackend.MATH):
        # The plain products are 2.7 times as fast as fused attention at this size on a CPU.
        while step < options.steps:
            pixels, ids, learnt = batches[step]
            logits, wanted = answer_logits(model, packing, pixels, ids, learnt, frame)
            loss = F.cross_entropy(logits, wanted)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            rate = stage_of(step).learning_rate * rate_at(step, options)
            slow = options.vision_learning_rate * rate_at(step, options)
            for group, (vision, _) in zip(optimizer.param_groups, kinds, strict=True):
                group["lr"] = slow if vision else rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            words = wanted != tokenizer.eos_token_id
            hits = (logits.argmax(-1) == wanted)[words].float().mean().item()
            recent.append((loss.item(), hits))
            if step % 50 and step != options.steps:
                continue
            losses, rights = zip(*recent, strict=True)
            now = time.monotonic()
            record: dict[str, float] = {
                "step": step,
                "questions": step * per_step,
                "loss": sum(losses) / len(losses),
                "right": sum(rights) / len(rights),
                "rate": rate,
                "questions_per_s": len(recent) * per_step / (now - marked),
                "minutes": (now - started) / 60,
            }
            if step % 250 == 0 or step == options.steps:
                record |= validate(model, packing, val, options.questions_per_image)
                progress = {"step": step, "seconds": time.monotonic() - started}
                save_checkpoint(out, progress, model, optimizer)
            line = json.dumps({name: round(value, 5) for name, value in record.items()})
            log.write(line + "\n")
            log.flush()
            print(line, flush=True)
            recent, marked = [], time.monotonic()
    export(model, tokenizer, out / "model")


def main() -> None:
    """Read the options and train."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data" / "easy_vqa.parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    data, out, threads = arguments.pop("data"), arguments.pop("out"), arguments.pop("threads")
    train(Options(**arguments), data, out, threads)


if __name__ == "__main__":
    main()
