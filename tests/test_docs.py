"""The pages hold together: every link leads somewhere, the README is one sitting, messages name pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on the usual hosts."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert not broken


def test_the_readme_is_one_sitting_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert not [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_that_a_page_names_is_there(page):
    text = page.read_text()
    paths = re.findall(r"`((?:tive|scripts|tests)/[\w./-]+\.\w+)`(?! of)", text)  # `of` another project
    named = [path for path in paths if not (ROOT / path).exists()]
    for path, names in re.findall(r"`(tive/[\w/]+\.py)`: ((?:`\w+`(?:, |; )?)+)", text):
        named += [f"{path}: {name}" for name in re.findall(r"\w+", names) if not defines(ROOT / path, name)]
    for dotted in re.findall(r"\btive(?:\.\w+)+", text):
        module, _, name = dotted.rpartition(".")
        path = (ROOT / module.replace(".", "/")).with_suffix(".py")
        if not (ROOT / dotted.replace(".", "/")).with_suffix(".py").exists() and not defines(path, name):
            named.append(dotted)
    assert not named


def defines(module: Path, name: str) -> bool:
    return (
        module.exists() and re.search(rf"^(?:def|class) {name}\b|^{name}\b.* =", module.read_text(), re.M) is not None
    )


def test_programs_name_pages_that_exist():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *(ROOT / "tive").rglob("*.py"), *(ROOT / "scripts").rglob("*.*")]
    texts = {source: source.read_text() for source in sources if source.suffix in (".py", ".sh", ".sbatch", ".yaml")}
    named = {(source, page) for source, text in texts.items() for page in re.findall(r"docs/[\w]+\.md", text)}
    assert not [(str(source), page) for source, page in named if not (ROOT / page).is_file()]
    # The README is for people who begin: a message that explains leads to the subject's page.
    assert not [source for source, text in texts.items() if re.search(r"\(README[,)]|README, ", text)]
