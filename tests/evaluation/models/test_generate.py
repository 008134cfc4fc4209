"""Answers generated in batches are those of each prompt alone."""

from __future__ import annotations

import torch

from corda_vlm.data import ConversationBatches
from corda_vlm.evaluation.models.generate import before_any, generate
from corda_vlm.evaluation.models.text_model import TextGenerator
from tests.evaluation.known_model import PLAIN


def test_generation_is_that_of_each_prompt_alone(tiny_llm, records) -> None:
    data = records([{"question": "is there " * k, "answer": "yes"} for k in (1, 7, 3, 12, 5)])
    builder = ConversationBatches(data, tiny_llm.processor, chat=PLAIN)
    prompts = [builder.prompt(i, 6) for i in range(5)]
    tokenizer, side = tiny_llm.processor.tokenizer, tiny_llm.processor.tokenizer.padding_side
    tiny_llm.model.train()
    tiny_llm.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=2.0)
    generator = TextGenerator(tiny_llm.model, tiny_llm.processor, batch_size=2)
    said = generate(generator, prompts, max_new_tokens=6)
    assert tiny_llm.model.training
    assert tokenizer.padding_side == side
    tiny_llm.model.eval()
    for prompt, own in zip(prompts, said, strict=True):
        ids = prompt["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                following = tiny_llm.model(input_ids=ids[None]).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None]])
        assert (
            own
            == tokenizer.decode(ids[len(prompt["input_ids"]) :], skip_special_tokens=True).strip()
        )
    words = [text[len(text) // 2 :][:1] for text in said if text]
    stopped = generate(generator, prompts, max_new_tokens=6, stop=words)
    assert stopped == [before_any(text, words).strip() for text in said]
    assert before_any("yes, no.", [".", ","]) == "yes"
