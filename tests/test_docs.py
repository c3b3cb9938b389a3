"""The documentation: its site is built, its links lead somewhere, and what it says to type works."""

import ast
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate

import pytest
import yaml
from conftest import ROOT, stasc_environment

import stasc.command_line.cli
from stasc.__main__ import SCRIPTS
from stasc.command_line import chat
from stasc.report import command as report
from stasc.run import flatten

GUIDES = sorted(ROOT.glob("docs/*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *GUIDES]
OUTPUT = ("text", "bibtex")
"""Languages of blocks in which there is nothing to run."""

TESTED_BY = {
    "./setup.sh && .venv/bin/python -m pytest": ".ci/run",
    './setup.sh && .venv/bin/python -m pytest -m "not slow"': ".ci/run",
    "stasc --version": "tests/test_installed.py",
}
"""Commands that the program's parser does not read, and what runs them."""


@dataclass(frozen=True)
class Block:
    """A fenced block, and the HTML comment in the line before it."""

    line: int
    language: str
    title: str | None
    text: str
    comment: str


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, f"{page.name}: a block has no end"
    for first, last in zip(fences[::2], fences[1::2], strict=True):
        language, _, rest = lines[first].strip().removeprefix("```").partition(" ")
        title = re.fullmatch(r'title="(.+)"', rest)
        comment = re.fullmatch(r"<!-- (.+) -->", lines[first - 1].strip())
        text = textwrap.dedent("\n".join(lines[first + 1 : last])) + "\n"
        yield Block(first + 1, language, title and title[1], text, comment[1] if comment else "")


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^\s*```.*?^\s*```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


class ParserIsReady(BaseException):  # the program tells of every Exception in a sentence
    pass


class ParserOnly(stasc.command_line.cli.STaSCCLI):
    def parse_arguments(self, parser, args):
        raise ParserIsReady(parser)


class NoCorrector:
    @staticmethod
    def from_pretrained(*options):
        raise ParserIsReady(options)


@pytest.fixture(scope="module")
def parse():
    """Parses a command with the program's own parser, which takes longer to make than to use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stasc.command_line.cli, "STaSCCLI", ParserOnly)
        patch.setattr(sys, "argv", ["stasc", "fit"])
        with pytest.raises(ParserIsReady) as ready:
            stasc.command_line.cli.run()
    return ready.value.args[0].parse_args


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, with the configs and scripts of the program in it."""
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def type_in(parse, folder, monkeypatch):
    """Reads a line that a page tells the user to type, as far as it goes without running it."""

    def type_in(line: str) -> None:
        words = shlex.split(line, comments=True)
        if " ".join(line.partition("#")[0].split()) in TESTED_BY:
            return
        if words[0] == "./setup.sh":
            words = words[2:]
        if words[0].endswith("python") and words[1] == "-m":
            words = words[2:]
        if words[0] == "python":
            words = ["stasc", Path(words[1]).stem, *words[2:]]
        assert words[0] == "stasc", f"not the program: run it in a test, or say why it is not run: {line}"
        if words[1] == "report":
            monkeypatch.setattr(report, "report", lambda *_: [])
            report.main(words[2:])
        elif words[1] == "chat":
            monkeypatch.setattr(chat, "SelfCorrector", NoCorrector)
            with pytest.raises(ParserIsReady):
                chat.main(words[2:])
        elif words[1] in SCRIPTS:
            for options in of_script(*words[1:]):
                parse(["fit", *options])
        else:
            command = "fit" if words[1] == "check" else words[1]
            # A model's folder has what a command without a config needs; here the demo's stands for it.
            config = [] if "--config" in words else ["--config", "configs/quickstart.yaml"]
            parse([command, *config, *(word for word in words[2:] if word != "--print_config")])

    def of_script(name: str, *words: str) -> Iterator[Sequence[str]]:
        """Options of ``fit`` for a run of a script; all runs differ only in values that the script sets."""
        monkeypatch.setattr(sys, "argv", [name, *words])
        monkeypatch.setattr(script := importlib.import_module("ablation"), "run", lambda *asked: asked)
        if name == "search":
            search = importlib.import_module(name)
            monkeypatch.setattr(search, "search", lambda *asked: asked)
            arguments, options = search.main()
            assert search.read_space(arguments.space)
            yield options
            return
        with pytest.raises(SystemExit) as asked:
            runpy.run_path(f"scripts/{name}.py", run_name="__main__")
        systems, arguments, options = asked.value.code
        assert script.slots(vars(arguments).get("devices", []))
        for configs in arguments.config:
            overlays = [word for config in configs for word in ("--config", config)]
            yield [*overlays, *options, *next(iter(systems.values()))]

    return type_in


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_what_a_page_shows_is_run_or_says_why_not(page, parse, type_in, folder):
    """Blocks with a title become files; the page's other blocks are run beside them, one after another."""
    names: dict = {}
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.comment.startswith("not run: ") or block.language in OUTPUT:
            continue
        if block.comment.startswith("from "):
            source = (ROOT / block.comment.removeprefix("from ")).read_text()
            there, shown = ([line.strip() for line in text.splitlines()] for text in (source, block.text))
            assert "\n".join(shown) in "\n".join(there), where
            continue
        path = folder / (block.title or f"line-{block.line}.{block.language}")
        path.write_text(block.text)
        importlib.invalidate_caches()
        if block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "json":
            assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines()), where
        elif block.language == "yaml":
            if yaml.safe_load(block.text).keys() <= {"algorithm", "data", "model", "sampler", "trainer"}:
                parse(["fit", "--config", "configs/quickstart.yaml", "--config", str(path)])
            else:
                assert block.title, f"{where}: is it a config?"
        else:
            assert block.language == "bash", f"{where}: say what language it is"
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                type_in(line)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_a_file_that_a_page_shows_is_used_on_it(page):
    shown = list(blocks(page))
    for block in shown:
        if block.title:
            later = "".join(other.text for other in shown if other.line > block.line)
            assert block.title.removesuffix(".py") in later, block.title


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=by_name)
def test_options_and_classes_are_called_so(page, parse, folder):
    """Of all that stands in `code` in the text and its tables."""
    quickstart = {
        option.replace(".init_args.", "."): value
        for option, value in flatten(
            parse(["fit", "--config", "configs/quickstart.yaml"]).fit.as_dict()
        ).items()
    }
    of_programs = "".join(
        path.read_text()
        for path in (*ROOT.glob("scripts/*.py"), Path(report.__file__), ROOT / "stasc/command_line/check.py")
    )
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        words = code.split()
        if words[0].startswith("--") and "." in words[0] and len(words) > 1 and words[1] != "...":
            file = "configs/prompts/demo.yaml"
            parse(["fit", "--config", "configs/quickstart.yaml", *(w.replace("FILE", file) for w in words)])
        elif words[0].startswith("--") and "." not in words[0]:
            own = any(f"{option}.".startswith(f"{words[0][2:]}.") for option in quickstart)
            of_argparse = words[0].partition("=")[0] in ("--config", "--print_config", "--help")
            of_vllm = words[0] in ("--generation-config", "--dtype")
            assert own or of_argparse or of_vllm or f'"{words[0]}"' in of_programs, code
        elif code == "stasc.yaml":
            continue
        elif name := re.fullmatch(r"(?:--)?((?:algorithm|model|data|sampler|trainer|stasc)\.[\w.]+\w)", code):
            parts = name[1].split(".")
            above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
            is_option = any(f"{option}.".startswith(f"{name[1]}.") for option in quickstart)
            in_null = any(quickstart.get(option, ...) is None for option in above)
            assert is_option or in_null or locate(name[1]), code


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.is_file(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text() if heading else "", re.MULTILINE)
        anchors = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in headings}
        assert not heading or heading in anchors, target


def test_messages_in_the_faq_are_those_of_the_program():
    """Their constant parts."""
    sources = [path for room in ("stasc", "data", "callbacks") for path in ROOT.glob(f"{room}/**/*.py")]
    said = [(ROOT / "setup.sh").read_text()]
    for path in sources:
        nodes = ast.walk(ast.parse(path.read_text()))
        said += [
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    messages = re.findall(r"\*\*`([^`]+)`", (ROOT / "docs/faq.md").read_text())
    assert len(messages) > 20
    for message in messages:
        for part in filter(None, map(str.strip, message.removeprefix("setup: ").split("..."))):
            assert any(part in text for text in said), message


def test_every_module_has_its_place_in_the_api():
    pages = "".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(set(shown)) == len(shown)
    there = set()
    for room in ("stasc", "data", "callbacks"):
        for path in ROOT.glob(f"{room}/**/*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.name not in ("__init__.py", "__main__.py"):
                there.add(module)
    assert there <= set(shown) <= there | {"callbacks"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs, which ./setup.sh installs")
def test_the_site_is_built_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=stasc_environment(tmp_path) | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    method = (tmp_path / "site/api/method/index.html").read_text()
    for name in ("stasc.algorithm.STaSC.select", "stasc.experiment.Experiment.dataset"):
        assert f'id="{name}"' in method, name
    results = (tmp_path / "site/measured/index.html").read_text()
    assert "As the release does it" in results  # of benchmarks/RESULTS.md


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, cache):
    notebook = json.loads((ROOT / "docs/demo.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    for name, value in stasc_environment(cache).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    table = names["table"]
    assert table["r2"].iloc[-1] > table["r2"].iloc[0]
    assert len(names["learnt"]) == table["learnt"].iloc[1] > 0
