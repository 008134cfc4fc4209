"""The tools that recipes are run with, each in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = "CORDA_VLM_TOOLS"
"""The environment variable that names the folder of the environments; without it they are in `.venvs/`."""


@dataclass(frozen=True)
class Tool:
    """A tool, and the environment that it runs in.

    Attributes:
        name: also of its environment's folder, and of `tests/integrations/test_NAME.py`.
        requirements: what pip is asked for; what the tests' own environment has is there too, unless pip has to take
            another version of it. None for the tests' own environment.
        packages: whose versions the table tells.
        alone: what is installed without what it requires itself: `requirements` has the part of that which is needed.
        sources: whose source distributions are unpacked into the environment's folder `sources`, and not built.
    """

    name: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        return Path(os.environ.get(FOLDER) or ROOT / ".venvs") / self.name

    @property
    def python(self) -> Path:
        """The interpreter that has the tool."""
        return self.place / "bin" / "python" if self.requirements else Path(sys.executable)

    @property
    def ready(self) -> bool:
        return not self.requirements or (self.place / "ready").exists()

    def prepare(self) -> None:
        """Make the environment if it is not there.

        Raises:
            CalledProcessError: venv or pip failed; its `stdout` says how.
        """
        if self.ready:
            return
        if not self.python.exists():
            shutil.rmtree(self.place, ignore_errors=True)
            _checked([sys.executable, "-m", "venv", str(self.place)])
            (site,) = (self.place / "lib").glob("python*/site-packages")
            # PyTorch and the rest are not installed again: those of the environment that runs the tests are seen
            below = [entry for entry in sys.path if entry.endswith("site-packages")]
            (site / "base.pth").write_text("\n".join(below) + "\n", encoding="utf-8")
        pip = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        _checked([*pip, *self.requirements])
        if self.alone:
            _checked([*pip, "--no-deps", *self.alone])
        for source in self.sources:
            self._unpack(source)
        (self.place / "ready").touch()

    def _unpack(self, source: str) -> None:
        folder = self.place / "sources"
        shutil.rmtree(folder, ignore_errors=True)
        _checked([
            str(self.python), "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:",
            "-d", str(folder), source,
        ])  # fmt: skip
        for archive in folder.glob("*.tar.gz"):
            shutil.unpack_archive(archive, folder, filter="data")
            archive.unlink()

    def versions(self) -> dict[str, str]:
        """Of each of `packages`, as the environment has it; nothing where it is not there."""
        code = (
            "import json, sys; from importlib.metadata import version; "
            "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
        )
        done = subprocess.run(
            [str(self.python), "-c", code, *self.packages], capture_output=True, text=True, check=False
        )  # fmt: skip
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def run(self, *words: str | Path, cwd: Path, timeout: float = 1800, **variables: str) -> str:
        """What the interpreter of the tool prints for `words`, which come after `python`.

        Raises:
            AssertionError: it ended with another status than 0; the message has the end of what it printed.
        """
        env = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT), "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}", **variables,
        }  # fmt: skip
        done = subprocess.run(
            [str(self.python), *map(str, words)], cwd=cwd, env=env, timeout=timeout, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (
            f"{self.name} ended with status {done.returncode}:\n{done.stdout[-6000:]}"
        )
        return done.stdout


def _checked(command: Sequence[str]) -> None:
    subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )  # fmt: skip


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("trainer", (), ("transformers", "peft")),
        Tool("accelerate", (), ("accelerate", "peft")),
        Tool("trl", ("trl",), ("trl", "transformers", "peft")),
        Tool("open_clip_train", ("open_clip_torch[training]",), ("open_clip_torch", "peft")),
        # it pins PEFT 0.18, which imports of torchao, where there is any, what 0.15 and later no longer have; the tests' own
        # environment has a later one
        Tool(
            "llamafactory",
            ("llamafactory", "torchao<0.15"),
            ("llamafactory", "transformers", "peft"),
        ),
        # it pins PyTorch 2.13, which takes a torchvision of its own
        Tool("axolotl", ("axolotl", "torchvision==0.28.*"), ("axolotl", "transformers", "peft")),
        Tool("swift", ("ms-swift",), ("ms-swift", "transformers", "peft")),
        Tool("peft_own", (), ("peft",)),
        # as LLaMA-Factory's PEFT
        Tool(
            "peft_old",
            ("peft==0.17.1", "transformers==4.57.*", "torchao<0.15"),
            ("peft", "transformers", "torchao"),
        ),
        Tool("llava", (), ("transformers", "peft")),
        Tool("lm_eval", ("lm_eval",), ("lm_eval", "transformers")),
        # lmms-eval 0.7.3 changes what filelock 4 no longer has
        Tool("lmms_eval", ("lmms_eval", "filelock<4"), ("lmms_eval", "transformers", "filelock")),
        # its checks of an adapter, which need no GPU; all that it requires would be some 8 GB
        Tool(
            "vllm",
            (
                "aiohttp",
                "cachetools",
                "cbor2",
                "einops",
                "fastapi",
                "llguidance",
                "msgspec",
                "openai",
                "openai-harmony",
                "partial-json-parser",
                "prometheus_client",
                "py-cpuinfo",
                "pybase64",
                "pyzmq",
                "uvloop",
                "xgrammar",
            ),
            ("vllm", "transformers"),
            alone=("vllm==0.33.0",),
        ),
        # the converter is in no wheel; the sources of llama-cpp-python have it
        Tool(
            "llama_cpp",
            ("xllamacpp", "sentencepiece", "gguf"),
            ("xllamacpp", "gguf"),
            sources=("llama-cpp-python==0.3.36",),
        ),
        # float() of an array of one number, which it takes, is an error since NumPy 2.4
        Tool(
            "clip_benchmark",
            ("clip_benchmark", "numpy<2.4"),
            ("clip_benchmark", "open_clip_torch", "numpy"),
        ),
    )
}
