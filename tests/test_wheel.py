"""What pip installs has the assets inside, and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

from corda_vlm.files import asset


def test_the_wheel_carries_its_assets_and_runs_alone(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=asset("."),
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert tops == {"corda_vlm", next(top for top in tops if top.endswith(".dist-info"))}, (
        "nothing named eval, tests or configs may land in site-packages"
    )
    for needed in (
        "configs/demo.yaml",
        "eval/suites/emoji-digits.yaml",
        "model_zoo/emoji-clip/card.yaml",
    ):
        assert f"corda_vlm/_assets/{needed}" in names
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert not [name for name in names if "/measured/" in name], "results stay in the repository"
    assert not [name for name in names if name.endswith((".pyc", ".pkl", ".pt", ".bin"))]
    alone = subprocess.run(
        [sys.executable, "-m", "corda_vlm", "sites", "emoji-clip", "--towers=vision"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    assert "visual.transformer.resblocks.*.mlp.mid" in alone.stdout
