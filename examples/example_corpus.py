"""Text for the example pair: the language reference, docstrings and sources that every CPython carries.

Documents come in four kinds: `topics` (the language reference of `pydoc_data`), `help` (docstrings laid out as `pydoc`
does), `chat` (a question about a name, answered by its docstring) and `code` (the sources themselves). A document
belongs to one source file; a twentieth of the files is held out, and paragraphs of held-out topics are cut from
the training text. Nothing is downloaded, and of the modules only the built-in ones are imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

EXCLUDED_FOLDERS = {
    "test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "encodings", "__pycache__",
    "lib-dynload", "pydoc_data", "turtledemo", "ensurepip", "_bundled",
}  # fmt: skip
EXCLUDED_FILES = {"stringprep.py", "entities.py", "locale.py", "_pydecimal.py", "_pyio.py", "__phello__.py"}
MAX_FILE_CHARS = 150_000
MIN_DOCSTRING_CHARS = 40
MAX_ANSWER_CHARS = 1_200
MIN_SHARED_PARAGRAPH_CHARS = 40
MAX_PROMPT_CHARS = 72
TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
CHAT_LAYOUT = "User: {question}\nAssistant: {answer}"

_PROSE = re.compile(r"[A-Z][a-z]*( [a-z*\"`()]+[,.]?){4}.{60}")
_SIGNATURE = re.compile(r" {0,4}def [a-z]\w*\([a-z].*\):$")


class Document(NamedTuple):
    """One text to learn from or to be tested on."""

    kind: str
    """One of `topics`, `help`, `chat`, `code`."""

    source: str
    """The topic, file or built-in module that the text comes from."""

    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the source belongs to the fixed twentieth that no training step sees."""
        return int.from_bytes(hashlib.sha256(f"held out? {self.source}".encode()).digest()[:4], "big") % 20 == 0


class Entry(NamedTuple):
    """A documented name: what it is called, what it is and what its docstring says."""

    title: str
    kind: str
    docstring: str


def load_documents() -> tuple[list[Document], list[Document]]:
    """The documents to train on and the held-out ones, both in a fixed order."""
    documents = [*_topics(), *_builtin_documents(), *_library_documents()]
    held_out = list(_without_repeats([document for document in documents if document.is_held_out], set()))
    known = {part for document in held_out if document.kind != "code" for part in _paragraphs(document)}
    training = [document for document in documents if not document.is_held_out]
    return list(_without_repeats(training, known)), held_out


def _without_repeats(documents: list[Document], known: set[str]) -> Iterator[Document]:
    """Topics and help without the paragraphs that are known; chats whose answers are neither known nor repeated."""
    answered = set(known)
    for document in documents:
        if document.kind == "chat":
            answer = _paragraphs(document)
            if answered.isdisjoint(answer):
                answered.update(answer)
                yield document
        elif document.kind == "code":
            yield document
        else:
            yield document._replace(text="\n\n".join(part for part in document.text.split("\n\n") if part not in known))


def _paragraphs(document: Document) -> list[str]:
    """The paragraphs of a document that are long enough to be nobody else's by chance, without a chat's question."""
    text = document.text.split("\nAssistant: ", 1)[-1] if document.kind == "chat" else document.text
    return [part for part in text.split("\n\n") if len(part) >= MIN_SHARED_PARAGRAPH_CHARS]


def _topics() -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document("topics", f"topic {name}", text.translate(TYPOGRAPHY).strip() + "\n")


def _library_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS & set(relative.parts) or path.name in EXCLUDED_FILES:
            continue
        # `_sysconfigdata_*` holds build paths of one machine.
        if path.name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not source.isascii() or not 200 <= len(source) <= MAX_FILE_CHARS:
            continue
        name = relative.as_posix()
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield Document("code", name, source.strip() + "\n")
        yield from _prose(name, module, list(_source_entries(module, ast.parse(source))))


def _source_entries(module: str, tree: ast.Module) -> Iterator[Entry]:
    docstring = ast.get_docstring(tree)
    if docstring:
        yield Entry(module, "module", docstring)
    pending: list[tuple[str, ast.AST]] = [(module, node) for node in tree.body]
    while pending:
        owner, node = pending.pop(0)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        title = f"{owner}.{node.name}"
        docstring = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            pending[:0] = [(title, child) for child in node.body]
        if docstring:
            kind = "class" if isinstance(node, ast.ClassDef) else "method" if owner != module else "function"
            yield Entry(title, kind, docstring)


def _builtin_documents() -> Iterator[Document]:
    for module in sorted(sys.builtin_module_names):
        yield from _prose(f"builtin {module}", module, list(_builtin_entries(module)))


def _builtin_entries(module: str) -> Iterator[Entry]:
    namespace = vars(importlib.import_module(module))
    for name, value in sorted(namespace.items()):
        if name.startswith("__") or not callable(value):
            continue
        members = sorted(vars(value).items()) if inspect.isclass(value) else []
        named = [(f"{module}.{name}", "class" if members else "function", value)]
        named += [
            (f"{module}.{name}.{member}", "method", method)
            for member, method in members
            if callable(method) and member != "__new__"
        ]
        for title, kind, item in named:
            docstring = getattr(item, "__doc__", None)
            if isinstance(docstring, str) and docstring.isascii():
                yield Entry(title.removeprefix("builtins."), kind, inspect.cleandoc(docstring))


def _prose(source: str, module: str, entries: list[Entry]) -> Iterator[Document]:
    entries = [entry for entry in entries if len(entry.docstring) >= MIN_DOCSTRING_CHARS]
    if not entries:
        return
    sections = [f"{entry.kind} {entry.title}\n\n{entry.docstring}\n" for entry in entries]
    yield Document("help", source, f"Help on module {module}:\n\n" + "\n".join(sections))
    for entry in entries:
        question, answer = _question(entry), _first_paragraphs(entry.docstring)
        yield Document("chat", source, CHAT_LAYOUT.format(question=question, answer=answer))


def _question(entry: Entry) -> str:
    if entry.kind == "module":
        return f"What is the module {entry.title} for?"
    if entry.kind == "class":
        return f"What is the class {entry.title}?"
    return f"What does {entry.title} do?"


def _first_paragraphs(docstring: str) -> str:
    answer = ""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if answer and len(answer) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        answer = f"{answer}\n\n{paragraph}" if answer else paragraph
    return answer


def held_out_prompts(held_out: list[Document], count: int) -> list[str]:
    """`count` one-line prompts of held-out documents: two thirds openings of paragraphs, one third `def` lines."""
    prose: list[str] = []
    signatures: list[str] = []
    for document in held_out:
        if document.kind in ("topics", "help"):
            lines = (" ".join(part.split()) for part in document.text.split("\n\n"))
            prose += [line[: line.rfind(" ", 0, MAX_PROMPT_CHARS)] for line in lines if _PROSE.match(line)]
        elif document.kind == "code":
            signatures += [line.strip() for line in document.text.splitlines() if _SIGNATURE.match(line)]
    return [*_spread(prose, count - count // 3), *_spread(signatures, count // 3)]


def _spread(candidates: list[str], count: int) -> list[str]:
    """`count` of the candidates, all of them distinct, from all over the list."""
    distinct = list(dict.fromkeys(candidates))
    return distinct[:: max(1, len(distinct) // count)][:count]
