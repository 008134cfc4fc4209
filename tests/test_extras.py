"""What `pip install corda-vlm` alone brings is enough but for what an extra is named for, and the error names it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import corda_vlm
from corda_vlm.errors import CordaError
from corda_vlm.extras import require
from corda_vlm.files import asset

# The package as Python imports it, the distribution that has it, its extra, and work that needs it.
OPTIONAL = {
    "sklearn": (
        "scikit-learn",
        "data",
        "from corda_vlm.data import load_records; load_records({'source': 'sklearn:digits'})",
    ),
    "bitsandbytes": (
        "bitsandbytes",
        "quantized",
        "from corda_vlm import load_model; load_model('emoji-clip-hf', quantization='nf4')",
    ),
    "matplotlib": ("matplotlib", "report", "import corda_vlm.report.plots.tradeoff"),
    "gguf": (
        "gguf",
        "gguf",
        "from pathlib import Path; Path('m.gguf').write_bytes(b'GGUF'); "
        "from corda_vlm import load_model; load_model('m.gguf')",
    ),
}
HIDE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, path=None, target=None: (
    None if name.partition(".")[0] in {sorted(OPTIONAL)} else find(name, path, target)
))
"""
DECLARED = dict(
    re.findall(r"^(\w+) = \[(.*)\]", asset("pyproject.toml").read_text("utf-8"), re.MULTILINE)
)
TOWERS = ("--towers", "vision")
SOURCES = sorted(Path(corda_vlm.__file__).parent.rglob("*.py"))


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("package", sorted(OPTIONAL))
def test_an_error_names_the_extra_that_is_missing(package, tmp_path):
    distribution, extra, work = OPTIONAL[package]
    done = run(HIDE + work, tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "CordaError: " in last, done.stderr
    assert package in last
    assert f"pip install 'corda-vlm[{extra}]'" in last
    assert distribution in DECLARED[extra]


def test_the_verbs_need_no_extra(tmp_path):
    data = asset("model_zoo/emoji-clip/data/noto.parquet")
    verbs = [
        ["--help"],
        ["sites", "emoji-clip"],
        ["calibrate", "emoji-clip", f"parquet:{data}", "--samples", "4", *TOWERS],
        [
            "plan",
            "emoji-clip",
            "--covariance",
            "covariance.safetensors",
            "--rank",
            "2",
            "--towers",
            "vision",
        ],
    ]
    code = HIDE + f"from corda_vlm.__main__ import main; [main(words) for words in {verbs}]"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sites" in done.stdout


def test_importing_the_package_alone_imports_no_other():
    code = (
        "import sys; before = set(sys.modules); import corda_vlm; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert run(code, Path(__file__).parent).stdout.split() == ["corda_vlm"]


def test_what_the_code_asks_for_is_an_extra():
    calls = [
        call
        for path in SOURCES
        for call in re.findall(r'require\(\s*"([\w.]+)",\s*"(\w+)"', path.read_text("utf-8"))
    ]
    asked = {(module.partition(".")[0], extra) for module, extra in calls}
    assert asked <= {(package, extra) for package, (_, extra, _) in OPTIONAL.items()}
    everything = re.findall(r"[\w-]+\[([\w,]+)\]", DECLARED["all"])
    assert {extra for _, extra in asked} == set(everything[0].split(","))


def test_a_package_that_lacks_one_of_its_own_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        require("broken", "report", "drawing")
    with pytest.raises(CordaError, match=r"drawing needs the package absent.*corda-vlm\[report\]"):
        require("absent.part", "report", "drawing")
