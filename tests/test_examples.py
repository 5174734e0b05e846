"""Every script in examples/ runs to its end, as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "plain_loop.py": ["sklearn"],
    "timm_model.py": ["timm"],
    "detector.py": ["torchvision"],
    "ddp.py": [],
    "operator_rule.py": [],
    "rank_criteria.py": ["sklearn"],
}


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("script", NEEDS)
def test_example_runs(script, tmp_path):
    for package in NEEDS[script]:
        pytest.importorskip(package)
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script)],
        cwd=tmp_path,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert not list(tmp_path.iterdir()), "an example leaves no files"


@pytest.mark.parametrize("script", NEEDS)
def test_example_is_short(script):
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < 80
