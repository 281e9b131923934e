"""The package and its documents avoid words and sentences that need a second reading."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "flash_celery").rglob("*.py"))
DOCUMENTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "example_project" / "README.md",
]

WORDS = re.compile(
    r"\b(nobody|somebody|whoever|anybody|anew|meanwhile|told|mend|mends|mended|mending)\b", re.I
)
#: A sentence whose subject is a clause ("What is left of it is sent again."), or a cell of a table.
CLAUSE = re.compile(
    r"(?:(?:^|[.!:;(|>]\s+|\n\n)[\W_]*(?=W)|\|\s+)"
    r"([Ww]hat\s+(?:is|are|was|were|has|have|had|can|cannot|could|may|must|will|would)\b"
    r"[^.?!|]*[.?!|]?)",
    re.M,
)
#: First words of docstrings of functions that do not say what the function does.
NOT_IMPERATIVE = re.compile(r"\W*(What|Whether|How|The|A|An)\b")

#: File, word (in lower case), and the reason why it is there.
EXCEPTIONS = {
    # A public attribute of flash_celery.testing.Enqueued.
    ("flash_celery/testing/applying.py", "told"),
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parts(identifier):
    """Split an identifier at underscores and capitals."""
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)


def comments(source):
    """Yield the line and text of each block of comments."""
    block, first, last = [], 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if block and line != last + 1:
                yield first, "\n".join(block)
                block = []
            first = first if block else line
            block.append(token.string.lstrip("#: "))
            last = line
    if block:
        yield first, "\n".join(block)


def texts(path):
    """Yield the line and text of everything in a file that people read."""
    source = path.read_text()
    if path.suffix != ".py":
        yield 1, source
        return
    yield from comments(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def words(path):
    """Yield the line and the avoided word for each in the texts and identifiers of a file."""
    for line, text in texts(path):
        for match in WORDS.finditer(text):
            yield line + text.count("\n", 0, match.start()), match[0]
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.NAME:
                for part in filter(WORDS.fullmatch, parts(token.string)):
                    yield token.start[0], part


def public_functions(tree):
    """Yield functions of a module and its classes whose names have no leading underscore."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.If | ast.Try):
            yield from public_functions(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {
                ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list
            }
            # A fixture is documented as the value that it gives, like a property.
            nouns = decorators & {"property", "cached_property", "fixture", "fixture()"}
            if not node.name.startswith("_") and not nouns:
                yield node


def test_prose_avoids_these_words():
    assert [
        f"{name_of(path)}:{line}: {word}"
        for path in (*PACKAGE, *DOCUMENTS)
        for line, word in words(path)
        if (name_of(path), word.lower()) not in EXCEPTIONS
    ] == []


def test_prose_has_no_clauses_as_subjects():
    assert [
        f"{name_of(path)}:{line + text.count(chr(10), 0, clause.start(1))}: {clause[1]}"
        for path in (*PACKAGE, *DOCUMENTS)
        for line, text in texts(path)
        for clause in CLAUSE.finditer(text)
        if not clause[1].endswith("?")
    ] == []


def test_docstrings_have_sections_for_parameters_and_errors():
    """Ruff (D417) checks the parameters of functions; this checks classes, and the other styles."""
    problems = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node) or ""
            if re.search(r":(param|returns?|raises) |^Raises\s+`|[.:;]\s+Raises\s+`", docstring):
                problems.append(f"{name_of(path)}:{node.lineno}: {node.name}")
            section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.M)
            parameters = constructor_parameters(node)
            if (
                section
                and parameters
                and re.findall(r"^    (\w+):", section[1], re.M) != parameters
            ):
                problems.append(f"{name_of(path)}:{node.lineno}: {node.name}: {parameters}")
    assert problems == []


def constructor_parameters(node):
    """Return the parameters of a class's own constructor; none for anything else."""
    constructors = [
        member.args
        for member in node.body
        if isinstance(node, ast.ClassDef) and getattr(member, "name", "") == "__init__"
    ]
    names = [
        each.arg for arguments in constructors for each in arguments.args + arguments.kwonlyargs
    ]
    return names[1:]


def test_docstrings_of_public_functions_begin_with_a_verb():
    assert [
        f"{name_of(path)}:{function.lineno}: {function.name}"
        for path in PACKAGE
        for function in public_functions(ast.parse(path.read_text()))
        if NOT_IMPERATIVE.match(ast.get_docstring(function) or "")
    ] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is told to nobody.", ["told", "nobody"]),
        ("Mended, and not recommended: nobodys", ["Mended"]),
    ],
)
def test_words_are_found_as_whole_words(text, found):
    assert WORDS.findall(text) == found
    assert parts("_NOBODY_isTold2") == ["NOBODY", "is", "Told"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("What is left of it is sent again.", 1),
        ("It ends. What was read is read again.", 1),
        ("What is a slot? It keeps WAL.", 0),
        ("| What is here | a cell |", 1),
        ("| what was here | a cell |", 1),
        ("Report what is left.", 0),
        ("## What a handler receives", 0),
    ],
)
def test_clauses_are_found_unless_they_are_questions(text, number):
    assert (
        len([clause for clause in CLAUSE.finditer(text) if not clause[1].endswith("?")]) == number
    )
