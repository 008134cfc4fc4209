"""The tests that depend most on other packages, under every Python and every transformers and PEFT that we promise.

    python -m tests.matrix                        # every Python that is installed
    python -m tests.matrix --python 3.12 --transformers 4.57 tests/adapter

Each combination has its own environment in runs/matrix/, which is kept. One environment a Python has PyTorch and the
newest of everything (5 GB); the others see it and hold only the packages whose versions differ.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TRANSFORMERS = ("4.57", "5")
TESTS = (
    "tests/adapter",
    "tests/families",
    "tests/methods/test_methods.py",
    "tests/train/test_train.py",
    "tests/train/test_trained.py",
)
"""What meets transformers and PEFT from all sides, in five to ten minutes a combination."""


@dataclass(frozen=True)
class Environment:
    """One combination.

    Attributes:
        python: the version of Python, e.g. "3.12".
        transformers: "4.57", or "5" for the newest.
        peft: a version, the lowest that pyproject.toml allows, or "newest".
    """

    python: str
    transformers: str
    peft: str

    @property
    def name(self) -> str:
        return f"py{self.python}-transformers{self.transformers}-peft{self.peft}"

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for beside the package itself."""
        after = int(self.transformers.partition(".")[0]) + 1
        held = "==4.57.*" if self.transformers == "4.57" else f">={self.transformers},<{after}"
        peft = "peft" if self.peft == "newest" else f"peft=={self.peft}.*"
        return [f"transformers{held}", peft]


def lowest_peft() -> str:
    """The version that pyproject.toml begins with."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"peft>=([\d.]+)', text)[0]


def interpreter(version: str) -> str | None:
    """The interpreter of a version: of the path, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*sorted(pyenv.glob(f"{version}.*/bin/python")), f"python{version}"]
    for candidate in candidates:
        path = shutil.which(candidate)
        if path and _run([path, "-c", "import sys; print(sys.version)"])[1].startswith(version):
            return path
    return None


def combinations(pythons: Sequence[str], transformers: Sequence[str]) -> Iterator[Environment]:
    """The newest of everything first, as the others of its Python stand on it."""
    for python in pythons:
        newest = Environment(python, "5", "newest")
        yield newest
        for release, peft in itertools.product(transformers, (lowest_peft(), "newest")):
            if (other := Environment(python, release, peft)) != newest:
                yield other


def prepare(environment: Environment, folder: Path, base: Path | None) -> Path:
    """The interpreter of an environment in `folder`, made if it is not there; one with a `base` sees its packages.

    Raises:
        CalledProcessError: venv or pip failed; its `stdout` says how.
    """
    place = folder / environment.name
    python = place / "bin" / "python"
    if (place / "ready").exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    command = interpreter(environment.python)
    if command is None:
        raise FileNotFoundError(f"Python {environment.python} is not installed")
    _checked([command, "-m", "venv", str(place)])
    if base is not None:
        (site,) = (place / "lib").glob("python*/site-packages")
        (below,) = (base.parent.parent / "lib").glob("python*/site-packages")
        (site / "base.pth").write_text(f"{below}\n", encoding="utf-8")
    _checked([
        str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *environment.requirements,
        "-e", f"{ROOT}[test]",
    ])  # fmt: skip
    (place / "ready").touch()
    return python


def run(environment: Environment, python: Path, tests: Sequence[str], log: Path) -> str:
    """The last words of pytest, whose output goes to `log`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    counts = re.findall(
        r"^(?=.*(?:passed|failed|error)).* in [\d.]+s.*$", log.read_text("utf-8"), re.MULTILINE
    )
    return counts[-1].strip("= ") if counts else f"pytest did not end: see {log}"


def versions(python: Path) -> str:
    """The versions of Python, transformers and PEFT that an environment has."""
    code = (
        "import platform; from importlib.metadata import version as v; "
        "print(platform.python_version(), '|', v('transformers'), '|', v('peft'), '|', v('torch'))"
    )
    return _run([str(python), "-c", code])[1].strip()


def main(words: Sequence[str] | None = None) -> int:
    """Run the combinations and print the table; 1 where a test failed."""
    parser = argparse.ArgumentParser("python -m tests.matrix", description=__doc__)
    parser.add_argument("tests", nargs="*", default=TESTS, help="files or folders of tests")
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--transformers", nargs="+", choices=TRANSFORMERS, default=TRANSFORMERS)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "matrix")
    parser.add_argument(
        "--base", type=Path, help="an environment of the same Python to stand on, as of .venv/bin/python"
    )  # fmt: skip
    options = parser.parse_args(words)
    here = [version for version in options.python if interpreter(version)]
    for version in set(options.python) - set(here):
        print(f"Python {version} is not installed: left out", flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for version in here:
        base: Path | None = options.base and options.base.absolute()
        for environment in combinations([version], options.transformers):
            wanted = environment.transformers in options.transformers
            if not wanted and base is not None:
                continue
            print(f"{environment.name}: installing", file=sys.stderr, flush=True)
            started = time.monotonic()
            try:
                python = prepare(environment, options.folder, base)
            except (subprocess.CalledProcessError, OSError) as error:
                rows.append((environment, "", f"not installed: {getattr(error, 'stdout', error)}"))
                continue
            base = base or python
            if wanted:
                print(f"{environment.name}: testing", file=sys.stderr, flush=True)
                log = options.folder / f"{environment.name}.log"
                outcome = run(environment, python, options.tests, log)
                rows.append((environment, versions(python), outcome))
                print(f"  {outcome} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    print("| Python | transformers | PEFT | torch | tests |\n|---|---|---|---|---|")
    for environment, found, outcome in rows:
        asked = f"{environment.python} | {environment.transformers} | {environment.peft} |"
        print(f"| {found or asked} | {outcome} |")
    good = [outcome for _, _, outcome in rows if not re.search(r"fail|error|not", outcome)]
    return int(len(good) < len(rows) or not rows)


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def _checked(command: list[str]) -> None:
    subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
