"""Every Python block of README.md and docs/ runs, page by page; links lead somewhere; the API page has all that is public."""

import contextlib
import re
import unittest
from pathlib import Path

import pytest

import taylored

sybil = pytest.importorskip("sybil", reason="runs the blocks of the pages: pip install sybil")
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)|^:?(?:image|figure)::? +(\S+)", re.MULTILINE)


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=name)
def test_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    document = sybil.Sybil([PythonCodeBlockParser(), SkipParser()], path=str(page.parent)).parse(page)
    for example in document.examples():
        with contextlib.suppress(unittest.SkipTest):  # a block that needs a package which is not there
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [match[1] or match[3] for match in LINK.finditer(text)]
    missing = [t for t in targets if not re.match(r"\w+:", t) and not (page.parent / t).exists()]
    assert not missing


def test_the_api_page_has_all_that_is_public():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [n for n in taylored.__all__ if not re.search(rf":: taylored\.{n}\b", text)]
    assert not missing


def test_tests_that_pages_name_are_there():
    for page in PAGES:
        for file, test in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")):
            assert (ROOT / file).is_file(), (name(page), file)
            assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (name(page), file, test)


def test_files_that_the_architecture_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:csrc|python|tests|docs|benchmarks)/[\w./]+\.(?:py|cpp|h|md|json))`", text)
    missing = [path for path in named if "/X." not in path and not (ROOT / path).exists()]
    assert named and not missing


def test_pages_name_no_private_module_as_public():
    """What begins with an underscore is for contributors: architecture.md alone speaks of it."""
    for page in PAGES:
        if page.name not in ("architecture.md", "design.md"):
            assert not re.search(r"(from|import) taylored\._", page.read_text(encoding="utf-8")), page
