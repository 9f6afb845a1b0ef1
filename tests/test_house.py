"""What holds for all files: plain names, short lines, imports that run one way, and an exact README."""
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COLUMNS = 110
ORDER = ("kernels", "model", "sample", "data", "judge", "selfplay", "toy", "checkpoint", "train", "arena",
         "eval")   # a file imports only what stands before it
PRODUCT = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
PAGES = (ROOT / "README.md", ROOT / "results" / "README.md")


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room(file: Path) -> str:
    """The entry of ORDER that a product file belongs to."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


# ---------------------------------------------------------------- names

# Private words for things that have names, and words with two meanings.
AVOIDED = set("""
    Seats seated working fill shrink place advance decide instructions begin WORTH AHEAD COMPANY BURST MARK
    Shape width inner apart merged upstream product widened Play Setting newborn warm_start
    Subject Arena Response unlikeness Inquiry Line Reading junk open decided
    ear mouth heard wishes listen go_back publish half found known given
    prefill record transcript fingerprint""".split())
ALLOWED = {("sample.py", "prefill")}   # its one meaning: the model's pass over prompts


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every function, class, parameter, variable, constant and field that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def test_names_are_found_wherever_python_lets_one_be_defined():
    code = """
import os as a
class B:
    c: int = 0
    def d(self, e, /, f=1, *g, h, **i):
        self.j = [k for k in (l := [1])]
m, (n, *o) = 1, (2, 3)
p: int
for q in (): pass
with open("x") as r: pass
try: pass
except OSError as s: pass
t = lambda u: u
"""
    assert sorted({name for _, name in named(ast.parse(code))} - {"self"}) == sorted("aBcdefghijklmnopqrstu")


@pytest.mark.parametrize("file", PRODUCT, ids=relative)
def test_nothing_has_a_private_name(file):
    names = [(line, name) for line, name in named(ast.parse(file.read_text()))
             if name in AVOIDED and (file.name, name) not in ALLOWED]
    assert not names, "\n".join(f"{relative(file)}:{line} {name}" for line, name in names)


# ---------------------------------------------------------------- lines and imports

@pytest.mark.parametrize("file", [*PRODUCT, *TESTS], ids=relative)
def test_lines_have_at_most_110_columns(file):
    lines = [number for number, line in enumerate(file.read_text().splitlines(), 1) if len(line) > COLUMNS]
    assert not lines, f"{relative(file)}, lines {lines}"


def test_every_product_file_has_its_place_in_the_order_of_imports():
    assert {room(file) for file in PRODUCT} == set(ORDER)


@pytest.mark.parametrize("file", PRODUCT, ids=relative)
def test_imports_run_one_way(file):
    for node in ast.walk(ast.parse(file.read_text())):   # imports inside functions, too
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in (module.partition(".")[0] for module in modules):
            upward = module in ORDER and ORDER.index(module) > ORDER.index(room(file))
            assert not upward and module != "tests", f"{relative(file)}:{node.lineno} imports {module}"


# ---------------------------------------------------------------- the README

def file_map() -> dict[str, int]:
    """
    The lines of each file or folder by the README: rows of a table that name it in backticks, as the first
    thing, and state a number in a cell of its own.
    """
    stated = {}
    for line in PAGES[0].read_text().splitlines():
        name = re.match(r"\|\s*\[?`([\w./]+(?:\.py|/))`", line)
        number = re.search(r"\|\s*([\d,]+)\s*(?:lines\s*)?(?=\|)", line)
        if name and number:
            stated[name[1]] = int(number[1].replace(",", ""))
    return stated


def count_lines(path: Path) -> int:
    """Lines of a file, or of all Python files in a folder."""
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text().splitlines()) for file in files)


def test_the_map_states_how_long_each_file_is():
    assert file_map(), "README.md has no table of files with their lines"
    for name, lines in file_map().items():
        actual = count_lines(ROOT / name)
        assert abs(lines - actual) <= 0.05 * actual, f"{name} has {actual} lines, README.md says {lines}"


def test_every_product_file_is_on_the_map():
    names = file_map().keys()
    missing = [relative(file) for file in PRODUCT if file.name != "__init__.py"
               and not {relative(file), f"{file.parent.name}/"} & names]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_figure_that_is_shown_exists(page):
    text = page.read_text()
    figures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(r"<img[^>]*\ssrc=[\"']([^\"']+)", text)
    local = [figure for figure in figures if not figure.startswith("https://")]
    assert local, f"{relative(page)} shows no figure"
    assert not [figure for figure in local if not (page.parent / figure).is_file()]


def test_the_readme_is_short_and_narrow():
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 300, f"README.md has {len(lines)} lines"
    in_code = False
    wide = []
    for number, line in enumerate(lines, 1):
        in_code ^= line.lstrip().startswith("```")
        links_cut = re.sub(r"\]\([^)]*\)|https?://\S+|(?:src|href)=\"[^\"]*\"", "", line)
        if len(links_cut) > 120 and not in_code and not line.startswith("|"):
            wide.append(number)
    assert not wide, f"README.md is wider than 120 columns in lines {wide}"
