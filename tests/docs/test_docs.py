"""What the pages promise: links and anchors lead somewhere, commands and code are understood, files named are there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from stable_rlhf.cli.arguments import parse

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "bench" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_on_the_map_and_every_picture_on_a_page() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    the_map = ROOT / "docs" / "README.md"
    mapped = {(the_map.parent / link).resolve() for link in links(the_map)}
    assert {page for page in PAGES if page not in (README, the_map)} <= mapped
    assert set((ROOT / "docs").rglob("*.png")) <= linked


def test_the_readme_is_of_one_sitting() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readmes_figures_are_those_of_the_study() -> None:
    """Every row of the method's table, cell by cell, in a row of that policy in the study's generated tables."""
    study = (ROOT / "docs" / "results" / "skill_world.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if re.match(r"\| (RM|AM)-PPO", line)]
    assert len(rows) == 4
    for row in rows:
        policy, *cells = row.strip("| ").split(" | ")
        assert any(line.startswith(f"| {policy} | ") and set(cells) <= {*line.split(" | ")} for line in study), row


@each_page
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition(" | ")[0], comments=True)
        if words[:1] == ["stable-rlhf"] and words[1] != "env" and "…" not in line:
            parse(words[1], ["recipes/quickstart.yaml" if word == "RECIPE" else word for word in words[2:]])
        for module in re.findall(r"python -m (bench[\w.]*)", line):
            assert importlib.util.find_spec(module), line
        for target in words[1:2] if words[:1] == ["make"] else []:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), line


@each_page
def test_code_compiles_and_imports_what_there_is(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
        for module, names in re.findall(r"^from (stable_rlhf[\w.]*) import ([\w, ]+)$", code, flags=re.MULTILINE):
            imported = importlib.import_module(module)
            for name in names.split(", "):  # those of a framework that is not here are known by name
                assert name in getattr(imported, "__all__", ()) or hasattr(imported, name), f"{module}.{name}"


def test_the_operation_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (code for code in blocks(README, "python") if "stable_rlhf.ops" in code)
    exec(code, {})
    assert "'policy_tokens': 3.0, 'rehearsal_tokens': 2.0" in capsys.readouterr().out


def test_the_drawing_has_the_layers_that_the_linter_holds() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (held,) = (contract["layers"] for contract in contracts if contract.get("containers") == ["stable_rlhf"])
    text = prose(ROOT / "docs" / "develop" / "architecture.md").partition("| layer, from the top |")[2]
    drawn = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`\w+`[^|]*) \|", text.partition("\n\n")[0], re.M)]
    assert drawn == [layer.split(" | ") for layer in held if layer != "__main__"]


@pytest.mark.parametrize("name", ["architecture", "new_op", "notes"])
def test_files_named_are_there(name: str) -> None:
    there = [f"/{path.relative_to(ROOT)}" for folder in ("stable_rlhf", "kernels", "csrc", "bench", "tests")
             for path in (ROOT / folder).rglob("*")]  # fmt: skip
    for named in re.findall(r"`([\w/]+\.(?:py|cpp|h|sh))`", prose(ROOT / "docs" / "develop" / f"{name}.md")):
        assert "NAME" in named or any(path.endswith(f"/{named}") for path in there), named
