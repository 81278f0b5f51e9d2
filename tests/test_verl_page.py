"""docs/verl.md has every place of veRL that our comments name; `python tests/test_verl_page.py` writes its table."""

import ast
import importlib.util
import io
import re
import tokenize
from pathlib import Path

HERE = Path(__file__).parent
PAGE, ROOM = HERE.parent / "docs" / "verl.md", HERE.parent / "rapo_verl" / "training"
VERL = Path(importlib.util.find_spec("verl").origin).parent
START, END = "<!-- table: python tests/test_verl_page.py -->\n", "<!-- end -->\n"
PLACE = re.compile(r"verl 0\.9\.1 ([\w/]+\.py):([\d, -]*\d)[:,]?\s*")


def enclosing(tree: ast.Module, line: int) -> str:
    """Return the dotted name of the class or function that a line stands in."""
    names, body = [], tree.body
    while body:
        inside = (n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
        node = next((n for n in inside if n.lineno <= line <= n.end_lineno), None)
        names += [node.name] if node else []
        body = node.body if node else []
    return ".".join(names)


def comments(text: str) -> list[tuple[int, str]]:
    """Return the blocks of comments of a module: line of the last one, and all words of it."""
    blocks: list[list] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, words = token.start[0], token.string.lstrip("# ")
            if blocks and blocks[-1][0] == line - 1:
                blocks[-1] = [line, f"{blocks[-1][1]} {words}"]
            else:
                blocks.append([line, words])
    return [(line, words) for line, words in blocks]


def naming(name: str) -> list[str]:
    """Return the tests that speak of a method or class of veRL's, by file."""
    word = re.compile(rf"\b{re.escape(name)}\b")
    files = sorted(path for path in HERE.glob("test_*.py") if path != Path(__file__))
    return [path.name for path in files if word.search(path.read_text())]


def rows() -> list[tuple[str, str, str, str, list[str]]]:
    """Return, of each place: ours, veRL's file and line, veRL's name there, what we say of it, the tests."""
    found = []
    for path in sorted(ROOM.glob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        for line, words in comments(text):
            for place in PLACE.finditer(words):
                file, lines = place.groups()
                first = int(re.match(r"\d+", lines)[0])
                theirs = enclosing(ast.parse((VERL / file).read_text()), first) or "(module)"
                ours = ".".join(filter(None, (path.stem, enclosing(tree, line))))
                said = words[place.end() :].split(" verl 0.9.1 ")[0]
                found.append(
                    (ours, f"{file}:{lines}", theirs, said, naming(theirs.removesuffix(".__init__").split(".")[-1]))
                )
    return found


def table() -> str:
    lines = ["| ours | veRL 0.9.1 | there | why | tests that name it |", "|---|---|---|---|---|"]
    for ours, place, theirs, said, tests in rows():
        said = said.replace("|", "\\|")
        lines.append(f"| `{ours}` | `{place}` | `{theirs}` | {said} | {', '.join(f'`{t}`' for t in tests)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    before, rest = PAGE.read_text().split(START)
    return before + START + table() + END + rest.split(END)[1]


def test_page_has_the_table_of_the_code_s_own_comments():
    assert PAGE.read_text() == page(), "write it anew: python tests/test_verl_page.py"


def test_every_place_is_guarded_by_a_test():
    assert len(rows()) > 25
    assert [(ours, theirs) for ours, _, theirs, _, tests in rows() if not tests] == []


if __name__ == "__main__":
    PAGE.write_text(page())
