"""The documentation: the site builds and works offline, links lead somewhere, commands exist, pages and code agree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from playwright.sync_api import sync_playwright
from ruamel.yaml import YAML

from pipeline.cli.commands import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")])
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site that SITE_DIR names, which continuous integration has built from these files, or a new one."""
    if "SITE_DIR" in os.environ:
        return Path(os.environ["SITE_DIR"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_site_loads_nothing_from_the_network(site):
    for page in site.glob("**/*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?(?:https?:)?//[^>]*>", html)
        loaded += re.findall(r"<link[^>]*\bhref=\"?(?:https?:)?//[^>]*>", html)
        assert not loaded, page.name


def test_site_shows_every_page_in_its_navigation(site):
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_search_works_without_server_or_network(site):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        requested, complaints = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((site / "index.html").as_uri())
        page.click("input[name=query]")
        page.keyboard.type("tdcl_loss")
        page.wait_for_selector(".md-search-result__item", state="attached")
        browser.close()
    assert complaints == []
    assert all(url.startswith("file://") for url in requested)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_to_files(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, _ in LINK.findall(prose):
        if target and not target.startswith(("https://", "http://")):
            assert (page.parent / target).exists(), target


def documented_commands() -> list[tuple[str, str]]:
    lines = [(page_id(page), line) for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    found = [
        (page, command.strip())
        for page, line in lines
        for command in re.findall(r"(?:^ {4,}|`)(pipeline [a-z][^`#\n&|>]*)", line)
    ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("page", "command"), documented_commands(), ids=lambda value: value[:60])
def test_documented_command_and_its_options_exist(page, command):
    words = command.removesuffix("...").split()[1:]
    context, current = click.Context(main), main
    while isinstance(current, click.Group) and words:
        subcommand = current.get_command(context, words.pop(0))
        assert subcommand is not None, command
        current = subcommand
    known = {name for parameter in current.get_params(context) for name in parameter.opts + parameter.secondary_opts}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


def test_readme_is_an_entrance_not_a_manual():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def listed_paths(tree: str) -> dict[str, bool]:
    """The paths of an indented tree, and whether each is a leaf; a line is `name[, name ...]  description`."""
    paths, parents = {}, []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            parents[depth:] = [name.rstrip("/")]
            paths["/".join(parents)] = True
            paths["/".join(parents[:-1])] = False
    return paths


def test_source_tree_covers_every_file():
    """docs/architecture.md lists each module of the code, or its folder as one line, and nothing that is not there."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    paths = listed_paths(re.search(r"```text\n(pipeline/.*?)```", text, re.DOTALL)[1])
    paths.pop("")
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = [
        file.relative_to(ROOT) for top in ("pipeline", "stages", "examples") for file in ROOT.glob(f"{top}/**/*.py")
    ]
    leaves = {path for path, is_leaf in paths.items() if is_leaf}
    uncovered = [
        file.as_posix()
        for file in files
        if file.name not in ("__init__.py", "__main__.py")
        and not leaves & {file.as_posix(), *(parent.as_posix() for parent in file.parents)}
    ]
    assert uncovered == []


def test_citation_names_the_paper_and_its_authors():
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert citation["cff-version"] == "1.2.0"
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Li", "Chen", "Yan", "Shi", "Shen"]
    assert {"type": "other", "value": "arXiv:2507.06482"} in paper["identifiers"]
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == version[1]
