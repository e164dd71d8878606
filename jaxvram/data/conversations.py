"""Conversations to learn from: of files (Alpaca's JSON, chats as JSON lines) and, offline, of Python's own library."""

import ast
import json
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxvram.data.prompt_styles import ROLES, Message
from jaxvram.data.text import decode
from jaxvram.errors import UserError, nearest

SUFFIXES = (".json", ".jsonl")
KINDS = (
    "a .json or .jsonl file, or a folder of them, with objects {instruction, input, output} (Alpaca) or "
    "{messages: [{role, content}, ...]}"
)
CODE_SIZES = range(30, 601)  # characters of a function
SUMMARY_SIZES = range(10, 301)  # of what its docstring says first


class Conversation(NamedTuple):
    where: str  # for messages
    messages: tuple[Message, ...]  # at most one of the system, then user and assistant in turns


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file or folder, in the order of names and lines.

    Raises:
      UserError: nothing is there, a line is damaged, keys are missing, a role is unknown, or nobody answers.
    """
    conversations = [
        _conversation(where, entry) for file in _files(path) for where, entry in _entries(file, _read(file))
    ]
    if not conversations:
        raise UserError(f"data.path={path} holds no examples: it must be {KINDS}")
    return conversations


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        hint = nearest(path.name, os.listdir(path.parent)[:20]) if path.parent.is_dir() else ""
        raise UserError(f"data.path={path} does not exist{hint}")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"the folder data.path={path} has no {' or '.join(SUFFIXES)}; give {KINDS}")
    return files


def _read(file: Path) -> str:
    try:
        return decode(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"could not read {file}: {error.strerror or error}") from error


def _entries(file: Path, text: str) -> Iterator[tuple[str, object]]:
    """(where it stands, object) of a JSON list, or of JSON lines, whatever the file is called."""
    if text.lstrip().startswith("["):
        try:
            for number, entry in enumerate(json.loads(text), 1):
                yield f"{file}, example {number:,}", entry
        except ValueError as error:
            raise _damaged(file, getattr(error, "lineno", 1), error) from error
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand within a string
        if line.strip():
            try:
                yield f"{file}, line {number:,}", json.loads(line)
            except ValueError as error:
                raise _damaged(file, number, error) from error


def _damaged(file: Path, line: int, error: Exception) -> UserError:
    return UserError(
        f"{file}, line {line:,} is damaged ({error}): mend or remove it; the file must be one JSON list, or one JSON "
        "object a line"
    )


def _conversation(where: str, entry) -> Conversation:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}, not an object: {KINDS}")
    if "messages" in entry:
        return Conversation(where, _turns(where, entry["messages"]))
    if missing := [key for key in ("instruction", "output") if key not in entry]:
        has = ", ".join(map(repr, list(entry)[:6])) or "nothing"
        raise UserError(f"{where} lacks {' and '.join(map(repr, missing))} (it has {has}): give {KINDS}")
    for key in ("instruction", "input", "output"):
        _check_text(where, key, entry.get(key) or "" if key == "input" else entry[key])
    user = Message("user", entry["instruction"], entry.get("input") or "")
    return Conversation(where, (user, Message("assistant", entry["output"])))


def _turns(where: str, messages) -> tuple[Message, ...]:
    is_message = lambda m: isinstance(m, dict) and {"role", "content"} <= m.keys()
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise UserError(f"{where}: 'messages' must be a list of objects with a 'role' and a 'content'")
    for message in messages:
        if message["role"] not in ROLES:
            raise UserError(f"{where}: the role {message['role']!r} is unknown{nearest(str(message['role']), ROLES)}")
        _check_text(where, "content", message["content"])
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"{where} has the roles {', '.join(roles) or 'of nobody'}: after at most one of system, user and assistant "
            "must take turns, and assistant end them"
        )
    return tuple(Message(m["role"], m["content"]) for m in messages)


def _check_text(where: str, key: str, value):
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}; it must be a text")


def python_functions(folder: Path | None = None) -> list[Conversation]:
    """Functions of Python's library, which every machine has: what the docstring says is to become the code.

    They are read and never run. Python versions differ a little.
    """
    answers = {}
    for file in sorted((folder or Path(sysconfig.get_path("stdlib"))).glob("*.py")):
        for question, code in _functions(file):
            answers.setdefault(question, code)
    if not answers:
        raise UserError("this Python has its library without sources: give data.path instead of data.dataset=offline")
    return [
        Conversation("Python's library", (Message("user", question), Message("assistant", code)))
        for question, code in answers.items()
    ]


def _functions(file: Path) -> Iterator[tuple[str, str]]:
    """(what to write, the code of it) for each plain function of a file that says what it does."""
    try:
        source = file.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):  # of escapes that later Pythons will not know
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or len(node.body) < 2:
            continue
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        first, second = node.body[:2]
        if len(summary) not in SUMMARY_SIZES or not node.lineno < first.lineno <= first.end_lineno < second.lineno:
            continue
        after = "\n".join(lines[first.end_lineno : node.end_lineno]).lstrip("\n")
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.lineno - 1]) + "\n" + after)
        question = f"Write a Python function {node.name}({ast.unparse(node.args)}): {summary}"
        is_plain = all(c == "\n" or " " <= c <= "~" for c in question + code)
        if is_plain and code.startswith("def ") and len(code) in CODE_SIZES:
            yield question, code
