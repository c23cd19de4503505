"""What README and docs/ name exists: files, modules and their parts, commands and options."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from pkt_fast.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names of other projects, and names of files, that look like names of ours.
FOREIGN = ("tl.", "torch.", "_library.")
FILES = {"py", "md", "json", "jsonl", "cpp", "h", "html", "safetensors", "txt", "so", "png"}

pytestmark = pytest.mark.skipif(not PAGES[1:], reason="needs the source tree")


def pages():
    return [pytest.param(page, id=page.name) for page in PAGES]


def exists(name: str) -> bool:
    """Whether ``name`` is a module of the package, or something in one."""
    parts = name.removeprefix("pkt_fast.").split(".")
    for count in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["pkt_fast", *parts[:count]]))
        except ImportError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", pages())
def test_paths_exist(page):
    for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(?:tests|docs|benchmarks|scripts|csrc|kernels|pkt_fast)/[\w./-]+", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("page", pages())
def test_dotted_names_exist(page):
    for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        for name in re.findall(r"(?<![\w./\"'-])[a-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w/])", span):
            if name.startswith(FOREIGN) or name.rpartition(".")[2] in FILES:
                continue
            assert exists(name), name


def test_a_name_that_does_not_exist_is_found():
    assert exists("maps.diagnose")
    assert exists("pkt_fast.LayerPair.target")
    assert not exists("maps.nothing")
    assert not exists("nothing.diagnose")


@pytest.mark.parametrize("page", pages())
def test_commands_parse(page):
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["pkt-fast"] and words[1] != "bench":  # which has a parser of its own
                build_parser().parse_args(words[1:])


def test_the_page_of_modules_has_all_of_them():
    named = set(re.findall(r"`([a-z_]+)/?`", (ROOT / "docs" / "design.md").read_text("utf-8")))
    package = ROOT / "pkt_fast"
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert (modules | folders) - {"_version"} <= named
