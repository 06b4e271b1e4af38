"""The wheel in an empty environment, what it says of itself, and what a release checks."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import tta
from tests.helpers.wheel import build_wheel, empty_environment, run_in
from tools import release
from tools.long_description import long_description, read_version, relative_links

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
URL = "https://example.org/people/tta-vision"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel and what it requires alone."""
    return empty_environment(tmp_path_factory.mktemp("environment") / "venv", wheel)


# The wheel


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in packages} == {"tta", "corruptions"}
    sources = {
        str(path.relative_to(ROOT))
        for package in ("tta", "corruptions")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    assert packages == sources
    assert {"tta/py.typed", "corruptions/py.typed"} <= packages


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (place,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    said = Parser().parsestr(archive.read(place).decode())
    assert (said["Name"], said["Version"]) == ("tta-vision", tta.__version__)
    assert said["Author"] == "The tta-vision developers"
    assert said["License-Expression"] == "Apache-2.0" and said["Requires-Python"] == ">=3.10"
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(
        said.get_all("Classifier", [])
    )
    needed = [text for text in said.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert {re.split(r"\W", text)[0] for text in needed} == {
        "torch", "numpy", "scipy", "safetensors",
    }  # fmt: skip
    assert said["Description-Content-Type"] == "text/markdown"
    description = said.get_payload()
    assert isinstance(description, str) and "tta.wrap(" in description
    assert relative_links(description) == []


@pytest.mark.slow
def test_the_environment_is_empty(python, tmp_path):
    code = (
        "import importlib.util as u; print([m for m in ('torchvision', 'timm', 'PIL', "
        "'matplotlib', 'models', 'experiments', 'tests') if u.find_spec(m)])"
    )
    done = run_in(python, "-c", code, folder=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.slow
def test_the_first_snippet_of_the_readme_works_with_the_wheel_alone(python, tmp_path):
    first = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert first is not None and "tta.wrap(" in first[1]
    done = run_in(python, "-W", "error::DeprecationWarning", "-c", first[1], folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_module_of_tta_imports_with_the_wheel_alone(python, tmp_path):
    code = """
import importlib, pkgutil, tta
names = [m.name for m in pkgutil.walk_packages(tta.__path__, "tta.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(tta.__file__, len(names))
"""
    done = run_in(python, "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    place, count = done.stdout.split()
    assert Path(place).is_relative_to(python.parents[1]) and int(count) > 50


@pytest.mark.slow
def test_adapters_save_and_load_with_the_wheel_alone(python, tmp_path):
    code = """
import torch, tta
from torch import nn
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 10)).eval()
images = torch.rand(16, 3, 8, 8)
adapter = tta.wrap(net(), "tent.cifar10", batch_size=16, output="lame")
adapter(images)
tta.save(adapter, "saved")
print(torch.equal(tta.load(net(), "saved")(images), adapter(images)))
domains = {name: [(torch.rand(3, 8, 8), i % 10) for i in range(40)] for name in ("fog", "snow")}
stream = tta.streams.build("continual", domains=domains, batch_size=8)
print(sum(len(adapter(batch.images)) for batch in stream))
"""
    done = run_in(python, "-c", code, folder=tmp_path)
    assert done.stdout.split() == ["True", "80"], done.stdout + done.stderr


@pytest.mark.slow
def test_the_console_script_is_installed(python, tmp_path):
    script = python.parent / "tta"
    for command in ([script], [python, "-m", "tta"]):
        done = subprocess.run(
            [*command, "methods", "eata"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "arXiv 2204.02610" in done.stdout and "fisher_weight = 2000.0" in done.stdout


# The long description


def test_links_become_plain_text_without_an_address():
    text = (
        "![picture](docs/a.png)\n\n[one](docs/a.md), [two](https://b.org/x), [`three`](c.md#d) "
        "[![badge](d.svg)](e.md) <!-- a `note` --> and `[code](x)`\n\n"
        "```\n[kept](as/it.is)\n```\n`last`"
    )
    plain = long_description(text, "", "1.0")
    assert plain == (
        "\n\none, [two](https://b.org/x), `three`   and `[code](x)`\n\n"
        "```\n[kept](as/it.is)\n```\n`last`"
    )
    full = long_description(text, URL, "1.0")
    assert f"![picture]({URL}/raw/v1.0/docs/a.png)" in full
    assert f"[`three`]({URL}/blob/v1.0/c.md#d)" in full
    assert f"[![badge]({URL}/raw/v1.0/d.svg)]({URL}/blob/v1.0/e.md)" in full
    assert relative_links(text) and not relative_links(full) and not relative_links(plain)


@pytest.mark.parametrize("repository", ["", URL])
def test_the_readme_has_no_other_links(repository):
    assert relative_links(long_description(README, repository, "1.0")) == []


# The release


def test_the_files_agree_about_the_version():
    version = read_version(ROOT)
    assert version == tta.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture
def repository(tmp_path):
    """A repository with the files that a release looks at, committed."""
    root = tmp_path / "repository"
    (root / "tta").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "SECURITY.md", "CITATION.cff", "tta/version.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{tta.__version__}] - 2026-11-30\n")
    git(root, "init", "-q")
    commit(root)
    return root


def git(root, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True)


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")


def test_a_release_fills_in_the_address_once_and_then_passes(repository):
    with pytest.raises(ValueError, match=r"look at pyproject\.toml, CITATION\.cff, SECURITY\.md"):
        release.check(repository, URL + "/")
    assert f'\nRepository = "{URL}"\n' in (repository / "pyproject.toml").read_text()
    assert f"\n{URL}/security/" in (repository / "SECURITY.md").read_text()
    cited = (repository / "CITATION.cff").read_text()
    assert f'\ndate-released: "2026-11-30"\nrepository-code: "{URL}"\n' in cited
    with pytest.raises(ValueError, match="working tree must be clean"):
        release.check(repository)
    commit(repository)
    release.check(repository)  # the address is known now
    with pytest.raises(ValueError, match="filled in now"):
        release.check(repository, "https://example.org/other/place")
    text = (repository / "pyproject.toml").read_text()
    assert text.count("Repository =") == text.count("Issues =") == 1 and URL not in text


@pytest.mark.parametrize(
    ("file", "text", "url", "message"),
    [
        (None, "", "", "`URL` must be the repository's public address"),
        (None, "", "example.org", "`URL` must be an https address of a repository"),
        ("CHANGELOG.md", "## [Unreleased]\n", URL, r"a section of this version, dated: ## \[0"),
        ("README.md", '<a href="docs/index.md">docs</a>\n', URL, r"README\.md must have links"),
        ("SECURITY.md", "Write to us.\n", URL, r"SECURITY\.md must have a place for the address"),
    ],
)
def test_a_release_refuses_in_words(repository, file, text, url, message):
    if file is not None:
        (repository / file).write_text(text)
    commit(repository)
    with pytest.raises(ValueError, match=message):
        for _ in range(2):  # the first may only fill in the address
            try:
                release.check(repository, url)
            except ValueError as error:
                if "filled in now" not in str(error):
                    raise
                commit(repository)


def test_the_command_says_why_there_is_no_release(repository, monkeypatch, capsys):
    monkeypatch.setattr(release, "ROOT", repository)
    assert release.main([]) == 2
    assert capsys.readouterr().err.startswith("no release: `URL` must be")
    assert not (repository / "dist").exists()
