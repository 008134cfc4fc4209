"""Run by `test_llama_cpp.py` with the interpreter that has xllamacpp: the next token of a prompt, as llama.cpp computes it.

python llama_cpp_live.py MODEL.gguf ADAPTER.gguf|none IDS OUTPUT
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path


def main(model: str, adapter: str, ids: str, output: str) -> None:
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 256
    params.cpuparams.n_threads = 1
    if adapter != "none":
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    asked = {"prompt": json.loads(ids), "max_tokens": 1, "temperature": 0, "logprobs": 5}
    said = server.handle_completions(asked)
    (first,) = said["choices"][0]["logprobs"]["content"]
    found = {one["id"]: one["logprob"] for one in first["top_logprobs"]}
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
