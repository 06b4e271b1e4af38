"""The documents say what the code does."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tta
from tests.helpers.documents import NEEDS, ROOT, python_blocks, run_blocks
from tta.cli.methods import field_meanings
from tta.core.registry import component

DOCS = ROOT / "docs"
NOTES = DOCS / "notes"  # parts of generated pages, whose links are those of the pages
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if NOTES not in path.parents),
]
SITE_NEEDS = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python")


@pytest.fixture(scope="module")
def generate() -> Any:
    """The module `docs/generate.py`."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Generated pages


def test_generated_pages_are_current(generate: Any) -> None:
    pages = generate.pages()
    written = {path for path in pages if path.parent == DOCS / "methods"}
    assert set((DOCS / "methods").glob("*.md")) == written
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name}: run python docs/generate.py"


def test_every_component_has_a_note_of_its_own(generate: Any) -> None:
    notes = {path.stem: path.read_text() for path in generate.METHOD_NOTES.glob("*.md")}
    assert set(notes) == set(tta.list_methods())
    for name, text in notes.items():
        assert "$$" in text, f"{name} has no formula"
        assert "## When to use it" in text and "## When not" in text, name
        page = (DOCS / "methods" / f"{name}.md").read_text()
        said = "https://arxiv.org/abs/" in page or "No arXiv number is known" in page
        assert name == "source" or said, f"{name} has no paper"


def _prose(page: Path) -> set[str]:
    """The paragraphs of a method's page that its note or docstring has."""
    paragraphs = page.read_text().split("\n\n")
    return {
        p
        for p in paragraphs
        if len(p) > 120
        and not p.startswith(("|", "#", "<!--", "*", "$$"))
        and "Mean error over" not in p
    }


def test_pages_of_components_from_one_file_differ() -> None:
    """Each page says what is its own: two share no more than one paragraph about a common field."""
    common = re.compile(rf"`({'|'.join(f.name for f in fields(tta.UpdateConfig))})\b")
    pages = {path.name: _prose(path) for path in sorted((DOCS / "methods").glob("*.md"))}
    for first, second in itertools.combinations(pages, 2):
        shared = pages[first] & pages[second]
        assert len(shared) < 2, f"{first} and {second}: {shared}"
        assert all(common.search(text) for text in shared), f"{first} and {second}: {shared}"
    assert sum(map(len, pages.values())) > 80


def test_every_field_has_a_meaning() -> None:
    for name in tta.list_methods():
        meanings = field_meanings(component(name).Config)
        missing = [f.name for f in fields(tta.get_config(name)) if not meanings.get(f.name)]
        assert not missing, f"{name}: write a comment behind {', '.join(missing)}"


def test_every_scenario_has_a_note_a_paper_and_a_picture(generate: Any) -> None:
    scenarios = set(tta.streams.list_scenarios())
    notes = {p.stem: p.read_text() for p in generate.STREAM_NOTES.glob("*.md")}
    assert set(notes) == scenarios | {"index"}
    assert {path.stem for path in generate.PICTURES.glob("*.png")} == scenarios
    for name in scenarios:
        assert "https://arxiv.org/abs/" in notes[name], name


@pytest.mark.slow
def test_pictures_of_streams_can_be_drawn_again(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(generate, "PICTURES", tmp_path / "streams")
    generate.draw_streams()
    drawn = {path.stem for path in (tmp_path / "streams").glob("*.png")}
    assert drawn == set(tta.streams.list_scenarios())


def test_every_component_is_on_the_page_that_tells_which_to_take(generate: Any) -> None:
    """In the tables of what it needs, and by stream wherever its note says so."""
    from docs import situations

    text = (DOCS / "which_method.md").read_text()
    needed, streams = (
        text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
        for mark in ("needs", "streams")
    )
    for name in tta.list_methods():
        note = (generate.METHOD_NOTES / f"{name}.md").read_text()
        assert situations.MARK.match(note), f"{name}: the first line says for which streams it is"
        _, good, bad = situations.split_note(note)
        link = f"[`{name}`](methods/{name}.md)"
        assert needed.count(link) == 3, name  # gradients or not, source or not, networks
        assert streams.count(link) == len(good) + len(bad), name
        assert (DOCS / "methods" / f"{name}.md").is_file()
    needs = situations.needs()
    assert needs["tent"].gradient and not needs["tent"].source
    assert needs["foa"].networks == ("a class token",) and not needs["foa"].gradient
    assert needs["eata"].source and not needs["eta"].source
    assert needs["bn"].networks == ("BatchNorm",) and needs["dda"].given
    assert needs["itta"].networks == ("BatchNorm", "GroupNorm")
    with pytest.raises(ValueError, match="must name situations"):
        situations.split_note("<!-- for: sorted; not for:  -->\n\ntext")
    with pytest.raises(ValueError, match="must name situations"):
        situations.split_note("<!-- for: single; not for: single -->\n\ntext")
    assert situations.split_note("text") == ("text", [], [])


def test_figures_by_stream_are_those_of_the_record() -> None:
    from docs import situations

    record = {("a", "continual", "source"): 40.0, ("a", "continual", "bn"): 30.04}
    record |= {("b", "mixed", "source"): 50.0, ("b", "mixed", "bn"): 51.0}
    rows = {
        words: (good, bad)
        for words, good, bad in situations.stream_rows(record, {"a": "", "b": ""})
    }
    assert (
        "[`bn`](methods/bn.md) (-10.0, -)," in rows["shuffled classes, one domain for a while"][0]
    )
    assert "[`bn`](methods/bn.md) (-, +1.0)," in rows["several domains in a batch"][0]
    assert "(" not in rows["very long, or domains come back"][0].replace("(methods", "")


def test_troubleshooting_has_every_sentence(generate: Any) -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    found = generate.messages()
    assert len(found) > 200
    for path, _, sentence in found:
        assert sentence.replace("`...`", "*argument*") in text, f"{path}: {sentence}"


def test_every_file_has_its_place_in_troubleshooting(generate: Any) -> None:
    """No pattern takes what it was not made for; what is about the model stands there."""
    with pytest.raises(ValueError, match=r"tta/new_room\.py: name the file"):
        generate.place_of("tta/new_room.py", "`model` must be old, got a new one.")
    new = [f"tta/{room}/new.py" for room in ("core", "parts", "methods")]
    assert [generate.place_of(p, "`x` must be y") for p in new] == ["Model"] * 2 + ["Source data"]
    places = {(p, s): generate.place_of(p, s) for p, _, s in generate.messages()}
    assert set(places.values()) == set(generate.PLACES)
    for (path, sentence), place in places.items():
        about_model = sentence.startswith("`model`") and path.startswith("tta/core/")
        if about_model and not path.endswith(("batch_split.py", "source_checks.py")):
            assert place == "Model", f"{path}: {sentence}"
        if place == "Names, fields and configs":
            assert not sentence.startswith(("`images`", "`source", "`folder`")), sentence


def test_no_page_calls_a_component_missing_that_is_there() -> None:
    there = {*tta.list_methods()}
    for page in PAGES:
        for line in page.read_text().splitlines():
            if "not in this version" in line or "not here" in line:
                told = {name for name in re.findall(r"`(\w+)`", line) if name in there}
                assert not told, f"{page.name}: {line}"


def test_no_line_of_prose_stands_twice() -> None:
    """What is left when two versions of a line are merged by keeping both."""
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        # Generated lists and lines of figures begin alike; what is written by hand does not.
        prose = [
            x[:50] for x in text.splitlines() if len(x) > 60 and not re.match(r"[|]|\* `|\d", x)
        ]
        twice = {start for start in prose if prose.count(start) > 1}
        if page.parent != DOCS / "methods" and page.name != "catalogue.md":
            assert not twice, f"{page.name}: {twice}"


# Figures


def test_figures_in_prose_are_those_of_the_record(generate: Any) -> None:
    gains = generate.gains()
    lost = sum(gain > 1 for gain in gains.values())
    better = sum(gain <= -1 for gain in gains.values())
    bn, gn, ln = generate.MODELS
    correlated = [(m, s) for m in (gn, ln) for s in ("dirichlet", "imbalance")]
    shuffled = [
        (m, s) for m in (gn, ln) for s in ("continual", "gradual", "mixed", "recurring", "walk")
    ]
    roid = [gains[m, s, "roid"] for m, s in shuffled]
    helped = [-gain for gain in roid if round(-gain, 1) >= 1]
    prior = [gains[m, s, "prior_correction"] for m, s in shuffled]
    both = [-gains[m, s, n] for m, s in correlated for n in ("roid", "prior_correction")]
    sar = max(gains[ln, s, "sar"] for s in generate.STREAMS)
    norms = [-gains[bn, s, n] for s in generate.STREAMS for n in ("alpha_bn", "robust_bn")]
    rdumb = [gains[gn, s, "rdumb"] for s in generate.STREAMS]
    gained = [-g for g in rdumb if g < -0.1]
    which, sar_note = "which_method.md", "notes/methods/sar.md"
    for page, sentence in (
        (which, f"Of the {len(gains)} figures of methods in the record {better} gain a point"),
        (which, f"{lost} lose more than a point"),
        (which, f"Both gain {min(both):.1f} to {max(both):.1f} points"),
        (which, f"`roid` gains {min(helped):.1f} to {max(helped):.1f} on {len(helped)} of"),
        (which, f"of {len(roid)} and loses at most {max(roid):.1f}"),
        (which, f"loses {gains[gn, 'single', 'roid']:.1f} on single images with GroupNorm"),
        (which, f"`prior_correction` loses {min(prior):.1f} to {max(prior):.1f}"),
        (which, f"gain {min(norms):.0f} to {max(norms):.0f} points"),
        (which, f"It gains {min(gained):.1f} to {max(gained):.1f} points on {len(gained)} streams"),
        (sar_note, f"never more than {sar:.1f} points above the source model"),
    ):
        text = " ".join((DOCS / page).read_text().split())
        assert sentence in text, f"{page} does not say: {sentence}"
    assert min(norms) > 0 and min(prior) > 0 and min(both) > 0
    assert max(rdumb) < 0.1 and len(rdumb) - len(gained) == 2  # level with source on the others


# Links and commands


def _references(page: Path) -> list[str]:
    """The names that a page of the reference describes."""
    return re.findall(r"^::: (\S+)", page.read_text(), flags=re.M)


def test_names_of_the_reference_can_be_imported() -> None:
    pages = {path: _references(path) for path in sorted((DOCS / "api").glob("*.md"))}
    assert all(pages.values())
    for path, names in pages.items():
        for name in names:
            assert _found(name), f"{path.name}: there is no {name}"
    assert not _found("tta.nothing") and not _found("nothing.at.all")


def _found(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


WIDTH = 84  # characters of code that fit beside the side bars, 1280 pixels wide


def test_code_is_not_cut_off() -> None:
    pages = [p for p in DOCS.rglob("*.md") if p.parent.name != "decisions"]
    for page in pages:
        for block in re.findall(r"^ *```.*?^ *```", page.read_text(), flags=re.M | re.S):
            for line in block.splitlines():
                assert len(line) <= WIDTH, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_commands_are_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-all", "docs"):
        assert f"make {target}" in text
        assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_no_page_names_a_module_that_has_moved() -> None:
    """Pages import from where things are now; `tta._moved` knows where they were."""
    from tta._moved import MOVED

    for page in PAGES:
        for old in MOVED:
            pattern = rf"(?<![\w.]){re.escape(old)}(?![\w/])"
            assert not re.search(pattern, page.read_text()), f"{page.name} names {old}"


# Python blocks


def test_every_python_block_says_what_it_needs() -> None:
    for page in PAGES:
        for block in python_blocks(page):
            assert block.needs in NEEDS, f"{page.name}, line {block.line}"


def test_the_first_blocks_need_the_wheel_alone() -> None:
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "start.md"):
        assert python_blocks(page)[0].needs == "tta"


@pytest.mark.parametrize(
    "needs",
    [need if need == "tta" else pytest.param(need, marks=pytest.mark.slow) for need in NEEDS],
)
def test_python_blocks_run(needs: str, tmp_path: Path) -> None:
    done = run_blocks(needs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    missing = [name for name in SITE_NEEDS if not _installed(name)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class _Loaded(HTMLParser):
    """Collects what a page loads, and whatever is not a link to be clicked."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            clicked = tag in ("a", "area") and name == "href"
            told = tag == "meta" or (tag == "svg" and name.startswith("xmlns"))
            if name == "style":
                self.inline += value or ""
            elif not clicked and not told and name in ("src", "href", "srcset", "data", "poster"):
                self.urls.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.inline += data


# What style sheets and scripts can load from another host.
FOREIGN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?\s*(?:https?:)?//""")
FOREIGN_SCRIPT = re.compile(r"""(["'`])(?:https?:)?//[\w.-]+\.\w+/[^"'`]*\1""")
# Names of XML vocabularies; and where the theme asks for stars and releases of a `repo_url`, which
# is not set.
NOT_LOADED = ("http://www.w3.org/", "https://api.github.com/", "https://${")


def foreign(page: str, text: str) -> list[str]:
    """What a file of the site would load from another host."""
    if page.endswith(".html"):
        parser = _Loaded()
        parser.feed(text)
        found = [url for url in parser.urls if re.match(r"\s*(https?:)?//", url)]
        return found + FOREIGN_STYLE.findall(parser.inline)
    if page.endswith(".css"):
        return FOREIGN_STYLE.findall(text)
    found = [match[0] for match in FOREIGN_SCRIPT.finditer(text)]
    return [url for url in found if not url[1:].startswith(NOT_LOADED)]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("a.html", '<script src="https://cdn.example.org/a.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//fonts.example.org/css">'),
        ("a.html", '<img src="http://example.org/a.png">'),
        ("a.html", '<p style="background: url(https://example.org/a.png)">'),
        ("a.html", "<style>@import 'https://example.org/a.css';</style>"),
        ("a.css", "src: url(https://example.org/font.woff2)"),
        ("a.css", '@import "//example.org/a.css";'),
        ("a.js", 'load("https://unpkg.com/mermaid@11/dist/mermaid.min.js")'),
    ],
)
def test_the_search_for_other_hosts_finds_them(page: str, text: str) -> None:
    assert foreign(page, text)


def test_links_to_papers_are_no_other_hosts() -> None:
    assert not foreign("a.html", '<a href="https://arxiv.org/abs/2006.10726">TENT</a>')


@pytest.mark.slow
def test_no_page_loads_from_another_host(site: Path) -> None:
    files = [p for p in site.rglob("*") if p.suffix in (".html", ".css", ".js")]
    assert len(files) > 50
    for path in files:
        if "lunr" not in path.parts:  # word lists of other languages, which are not loaded
            assert not foreign(path.name, path.read_text()), path.relative_to(site)
    assert "repo_url" not in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.slow
def test_what_pages_load_is_there(site: Path) -> None:
    for path in site.rglob("*.html"):
        if path.name == "404.html":  # its addresses begin at the host
            continue
        parser = _Loaded()
        parser.feed(path.read_text())
        for url in parser.urls:
            target = re.split("[?#]", url)[0]
            if target and not target.startswith("data:"):
                assert (path.parent / target).exists(), f"{path.relative_to(site)}: {url}"
    for path in (site / "assets" / "katex").glob("*.css"):
        for url in re.findall(r"url\(([^)]+)\)", path.read_text()):
            assert (path.parent / url).exists(), url


@pytest.mark.slow
def test_the_reference_has_the_comments_of_fields(site: Path) -> None:
    text = (site / "api" / "components.html").read_text()
    for comment in (
        "their eps is 1e-8",
        "Length of the features",
        "on top of its forward pass",
    ):
        assert comment.lower() in text.lower(), comment


@pytest.fixture(scope="module")
def browser() -> str:
    """The command of a browser."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(names)}")
    return browser


def _shown(browser: str, page: Path, folder: Path, query: str = "") -> str:
    """The document that a browser makes of a page, 1280 pixels wide and without a network."""
    done = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1280,900",
            f"--user-data-dir={folder}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=6000",
            "--dump-dom",
            page.as_uri() + query,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", ["methods/eata.html", "methods/roid.html", "glossary.html"])
def test_formulas_are_set_without_a_network(
    site: Path, browser: str, tmp_path: Path, page: str
) -> None:
    shown = _shown(browser, site / page, tmp_path)
    formulas = shown.count('class="arithmatex"')
    assert formulas and shown.count('class="katex"') == formulas
    assert "katex-error" not in shown


@pytest.mark.slow
def test_the_search_works_from_disk(site: Path, browser: str, tmp_path: Path) -> None:
    for page in ("start.html", "methods/eata.html"):
        shown = _shown(browser, site / page, tmp_path, "?q=resizable_buffers")
        assert shown.count('<li class="md-search-result__item">') > 0
        assert "add_a_method.html" in shown.partition("md-search-result__list")[2]


SCROLL = """<script>
addEventListener("load", () => setTimeout(() => {
  scrollTo(0, 2000);
  const table = document.querySelector(".many-columns table");
  const top = (element) => Math.round(element.getBoundingClientRect().top);
  document.documentElement.dataset.table = top(table);
  document.documentElement.dataset.header = top(table.querySelector("th"));
}, 1500));
</script></body>"""


@pytest.mark.slow
def test_the_header_of_the_longest_table_stays_in_sight(
    site: Path, browser: str, tmp_path: Path
) -> None:
    page = site / "networks-scrolled.html"
    page.write_text((site / "networks.html").read_text().replace("</body>", SCROLL))
    shown = _shown(browser, page, tmp_path)
    assert int(re.findall(r'data-table="(-?\d+)"', shown)[0]) < -1000
    assert 0 < int(re.findall(r'data-header="(-?\d+)"', shown)[0]) < 100


MEASURE = """<script>
addEventListener("load", () => setTimeout(() => {
  const kinds = ".md-typeset__scrollwrap, .katex-display, .md-typeset pre > code";
  const boxes = [...document.querySelectorAll(kinds)];
  const wide = boxes.filter((box) => box.scrollWidth > box.clientWidth + 1);
  document.documentElement.dataset.boxes = boxes.length;
  document.documentElement.dataset.wide = wide.length;
}, 1500));
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "record.html",
        "networks.html",
        "which_method.html",
        "methods/adanpc.html",
        "add_a_method.html",
        "corruptions.html",
        "experiments.html",
        "migrate.html",
        "start.html",
    ],
)
def test_nothing_is_cut_off(site: Path, browser: str, tmp_path: Path, page: str) -> None:
    file = site / page
    measured = file.with_stem(f"{file.stem}-measured")
    measured.write_text(file.read_text().replace("</body>", MEASURE))
    shown = _shown(browser, measured, tmp_path)
    assert int(re.findall(r'data-boxes="(\d+)"', shown)[0]) > 0
    assert re.findall(r'data-wide="(\d+)"', shown) == ["0"]
