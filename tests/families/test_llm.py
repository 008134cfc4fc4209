"""Loading models that generate text: folders, GGUF files, tokenizers, and what is refused."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.data import Chat
from corda_vlm.errors import CordaError
from corda_vlm.families import FAMILIES, block_rules, detect_family, load_model, register_family
from corda_vlm.families.llm import family
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites
from tests.families.language_toy import make, picture, tokenizer, with_processor


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    make("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


class TestFolders:
    def test_a_language_model(self, folder):
        loaded = load_model(folder)
        assert loaded.family is FAMILIES["llm"]
        assert isinstance(loaded.model, t.LlamaForCausalLM)
        assert not loaded.model.training
        processor: Any = loaded.processor
        assert not processor.takes_images
        assert (processor.image_token, processor.context, processor.image_size) == (
            None,
            128,
            (0, 0),
        )
        batch = processor.text(["What is this ?", "dog"])
        assert batch["attention_mask"].tolist() == [[True] * 4, [True] + [False] * 3]
        one: Any = processor.encode("What is dog", responses=[(8, 11)])
        assert one["labels"].tolist() == [-100, -100, one["input_ids"][-1]]
        with pytest.raises(CordaError, match="2 images for a model that reads text alone"):
            processor.encode("What", [1, 2])
        with pytest.raises(CordaError, match="LlamaForCausalLM has no vision tower"):
            processor.image(None)

    def test_precision_is_that_of_transformers(self, folder):
        loaded: Any = load_model(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
        # frequencies rounded to bfloat16 would put tokens in the wrong places
        assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32

    def test_a_device_map(self, folder):
        old = t.__version__.startswith("4.")  # it reads no file for the device "meta"
        device = "cpu" if old else "meta"
        loaded: Any = load_model(folder, device_map={"": device})
        assert {p.device.type for p in loaded.model.parameters()} == {device}
        if old:
            assert set(loaded.model.hf_device_map.values()) == {device}
        with pytest.raises(CordaError, match="device_map is for language models"):
            load_model("emoji-clip", device_map="auto")

    def test_images_take_transformers_5(self, monkeypatch):
        monkeypatch.setattr("transformers.__version__", "4.57.6")
        with pytest.raises(CordaError, match=r"takes transformers 5, and this is 4\.57\.6"):
            load_model("shapes-llava")

    @pytest.mark.parametrize(
        "name", ["llava", "llava_next", "paligemma", "qwen2_vl", "idefics3", "internvl"]
    )
    def test_a_vision_language_model(self, tmp_path, name):
        toy = with_processor(name)
        toy.model.save_pretrained(tmp_path)
        toy.whole.save_pretrained(tmp_path)
        loaded = load_model(tmp_path)
        assert loaded.family is FAMILIES["llava"]
        assert type(loaded.model) is type(toy.model)
        processor: Any = loaded.processor
        assert processor.takes_images
        assert processor.image_token_id == toy.whole.image_token_id
        assert [s.name for s in find_sites(loaded.model)] == [s.name for s in find_sites(toy.model)]
        state = loaded.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in toy.model.state_dict().items())

    @pytest.mark.sees
    def test_a_merged_export_is_a_folder_like_the_first(self, tmp_path):
        toy = with_processor("llava")
        toy.whole.chat_template = "{{ messages[0].content }}"
        toy.model.save_pretrained(tmp_path / "a")
        toy.whole.save_pretrained(tmp_path / "a")
        loaded = load_model(tmp_path / "a")
        attached = attach_adapter(
            loaded.model,
            plan_adapter(loaded.model, None, method="pissa", rank=2, show_progress=False),
        )
        export_adapter(attached, tmp_path / "b", format="merged", source=loaded.source)
        again: Any = load_model(tmp_path / "b")
        assert again.processor.image_token == "<image>"
        message = [{"role": "user", "content": "What"}]
        assert again.processor.templater.apply_chat_template(message, tokenize=False) == "What"

    def test_without_a_tokenizer_it_can_be_adapted(self, tmp_path):
        make("llama").save_pretrained(tmp_path)
        loaded: Any = load_model(tmp_path)
        assert find_sites(loaded.model)
        for call in (loaded.processor.text, lambda texts: loaded.processor.encode(texts[0])):
            with pytest.raises(CordaError, match="came without the files that this needs"):
                call(["What"])

    @pytest.mark.sees
    @pytest.mark.parametrize(
        ("gone", "told"),
        [
            (
                "processor_config.json",
                r"processor_config\.json \(or preprocessor_config\.json\) was",
            ),
            ("tokenizer.json", r"tokenizer\.json, or vocab\.json and merges\.txt, was"),
            (
                "processor_config.json tokenizer.json",
                r"tokenizer\.json, or vocab\.json and merges\.txt, was",
            ),
        ],
    )
    def test_what_was_looked_for_and_where_is_said(self, tmp_path, gone, told):
        """The tokenizer first: without one there is no chat template either."""
        toy = with_processor("llava")
        toy.whole.chat_template = "{{ messages[0].content }}"
        toy.model.save_pretrained(tmp_path)
        toy.whole.save_pretrained(tmp_path)
        for name in gone.split():
            (tmp_path / name).unlink()
        processor: Any = load_model(tmp_path).processor
        with pytest.raises(CordaError, match=rf"{tmp_path} came without .*{told} looked for"):
            Chat(processor).check()
            processor.encode("<image>", [picture()])

    def test_weights_that_are_missing(self, folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CordaError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
            load_model(folder)

    def test_an_unknown_kind(self, folder):
        edit(folder, model_type="falcon", architectures=["FalconModel"])
        with pytest.raises(CordaError, match=r"model_type is 'falcon'; known are .*llama.*declare"):
            load_model(folder)


class TestPadding:
    def load(self, folder, **tokens):
        make("llama").save_pretrained(folder)
        tokenizer(**tokens).save_pretrained(folder)
        return load_model(folder).processor

    def test_the_end_of_text_pads_where_nothing_else_does(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            processor: Any = self.load(tmp_path, pad_token=None)
        assert processor.tokenizer.pad_token == "</s>"
        assert "no padding token; '</s>', the end of text, is taken for it" in caplog.text
        assert processor.text(["What is", "dog"])["attention_mask"].tolist() == [[True, True], [True, False]]  # fmt: skip

    def test_neither(self, tmp_path):
        with pytest.raises(CordaError, match="neither a padding token nor an end of text"):
            self.load(tmp_path, pad_token=None, eos_token=None)


class TestQuantised:
    def test_a_folder_is_refused_before_it_is_read(self, folder):
        edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(CordaError, match=r"quantised \(gptq\).*bitsandbytes.*original weights"):
            load_model(folder)

    def test_a_model_is_refused(self):
        model: Any = make("llama")

        class Linear4bit(nn.Linear):
            """As that of bitsandbytes: a linear layer whose weight is codes."""

        packed = Linear4bit(4, 4)
        packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        model.model.layers[0].mlp.up_proj = packed
        with pytest.raises(
            CordaError, match=r"its base is quantised \(Linear4bit\).*Load the original weights"
        ):
            find_sites(model)


class TestUnknownArchitectures:
    def test_the_message_says_how_to_declare_one(self):
        model = t.BloomForCausalLM(
            t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
        )
        with pytest.raises(CordaError, match=r"BloomForCausalLM.*register_family"):
            detect_family(model)

    def test_and_that_works(self, registry):
        model = t.FalconForCausalLM(
            t.FalconConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
            )
        )
        layers = (
            ("self_attention.query_key_value", "qkv", "attn.in"),
            ("self_attention.dense", "o", "attn.out"),
            ("mlp.dense_h_to_4h", "up", "attn.in"),  # beside the attention
            ("mlp.dense_4h_to_h", "down", "mlp.mid"),
        )
        rules = block_rules(r"transformer\.h", "language", layers)
        register_family(family("mine", ("falcon",), rules))
        assert detect_family(model).name == "mine"
        assert len(find_sites(model)) == 8

    def test_the_decoder_alone_has_the_same_sites(self):
        whole = make("llama")
        inner = find_sites(whole.model)
        assert [f"model.{site.name}" for site in inner] == [site.name for site in find_sites(whole)]


class TestGGUF:
    @pytest.fixture
    def file(self, tmp_path, monkeypatch):
        gguf = pytest.importorskip("gguf", reason="the extra corda-vlm[gguf] is not installed")
        monkeypatch.setenv("CORDA_VLM_CACHE", str(tmp_path / "cache"))
        model, path = make("llama"), tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_context_length(128)
        writer.add_embedding_length(32)
        writer.add_block_count(2)
        writer.add_feed_forward_length(48)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(64)
        words = ["<unk>", "<s>", "</s>", "w", "0", "w0", *(f"x{number}" for number in range(58))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([gguf.TokenType.NORMAL] * 64)
        writer.add_token_merges(["w 0", "x1 0"])  # transformers 4 takes one alone for no list
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        for key, value in model.state_dict().items():
            tensor = value.bfloat16().float()
            if "q_proj" in key or "k_proj" in key:  # llama.cpp keeps rotary halves interleaved
                heads = 4 if "q_proj" in key else 2
                tensor = tensor.view(heads, 2, -1, 32).transpose(1, 2).reshape(tensor.shape)
            named = names.get_name(key, try_suffixes=(".weight",))
            writer.add_tensor(named, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, model

    def test_is_converted_once(self, file, tmp_path, monkeypatch):
        path, model = file
        loaded: Any = load_model(path)
        assert loaded.family is FAMILIES["llm"]
        for key, value in loaded.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[key].bfloat16().float()), key
        assert str(tmp_path / "cache") in loaded.source
        assert [p.name.startswith("tiny-") for p in (tmp_path / "cache" / "gguf").iterdir()] == [
            True
        ]
        import corda_vlm.families.loading.gguf as module

        monkeypatch.setattr(module, "_convert", None)
        assert load_model(path).source == loaded.source
        assert loaded.processor.tokenizer.eos_token_id == 2

    def test_a_stopped_conversion_leaves_nothing(self, file, tmp_path, monkeypatch):
        import corda_vlm.families.loading.gguf as module

        def stop(path, folder):
            (folder / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "_convert", stop)
        with pytest.raises(CordaError, match=r"No space left on device.*CORDA_VLM_CACHE"):
            load_model(file[0])
        assert not (tmp_path / "cache").exists()

    def test_a_truncated_file(self, file):
        path, _ = file
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(CordaError, match=r"does not load as a language model .*truncated"):
            load_model(path)

    def test_another_format(self, tmp_path):
        path = tmp_path / "x.gguf"
        path.write_bytes(b"PK..")
        with pytest.raises(CordaError, match="is no GGUF file"):
            load_model(path)
