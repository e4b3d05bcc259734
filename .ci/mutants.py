"""Do the tests notice when the daemon is wrong? Breaks it in hundreds of ways, one at a time.

    python3 .ci/mutants.py [--count 400] [--sections 1 2 6] [--only 17 23]

A mutant is a copy of the clone with one change in popup_notifier.py. What survives all tests, but
for those in browsers, is shown: no user could notice it, or a test is missing. 400 take hours.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PROGRAM, TESTS = "popup_notifier.py", "test_popup_notifier.py"
# What is said to a reader; and sizes, pauses, bounds: nobody sees that they are twice as much.
UNSEEN = re.compile(
    r"log\.|parser\.|if __name__|__slots__|(SLICE|TURN|STREAM|REDIS)_|"
    r"[A-Z_]+_(SIZES?|TIMEOUT|BATCH|DELAYS|PERIOD|INTERVAL|SLACK|PAUSE|FILES|QUEUE|BUCKETS)\b|"
    r"MAX_(FILES|JOINED|THREADS|KEPT|BULK|ELEMENTS|LINE|TIME)\b"
)
# Operators, what they are when flipped, and when their boundary has moved.
OPERATORS = "Eq NotEq,NotEq Eq,Is IsNot,IsNot Is,In NotIn,NotIn In,And Or,Or And".split(",")
OPERATORS += ["Lt GtE LtE", "LtE Gt Lt", "Gt LtE GtE", "GtE Lt Gt"]
RETURNED = "(lambda r: not r if r in (0, 1) else r + 1 if isinstance(r, (int, float)) else None)"
DELETED = (ast.AugAssign, ast.Raise, ast.Delete, ast.Return, ast.Break, ast.Continue)


def changes(node: Any) -> Iterator[tuple[Any, str]]:
    """Yield (node, code in its place) for each way to break this node."""
    operator = getattr(node, "ops", [getattr(node, "op", None)])[0]
    for old, *others in map(str.split, OPERATORS):
        for new in others if type(operator).__name__ == old else ():
            changed: Any = ast.parse(ast.unparse(node), mode="eval").body
            changed.op = getattr(ast, new)()
            changed.ops = [changed.op, *getattr(node, "ops", ())[1:]]
            yield node, f"({ast.unparse(changed)})"
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not isinstance(node.test, ast.Compare):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield node, f"({not node.value if isinstance(node.value, bool) else 2 * node.value or 1})"
    elif isinstance(node, ast.Return) and node.value and not isinstance(node.value, ast.Constant):
        yield node.value, f"{RETURNED}({ast.unparse(node.value)})"
    is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    is_set = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
    if is_call or is_set or isinstance(node, DELETED):
        yield node, "pass"


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may be broken."""
    for child in {*ast.iter_child_nodes(node)} - {getattr(node, "returns", None)}:
        is_said = isinstance(child, (ast.JoinedStr, ast.Assert, ast.arguments, ast.AnnAssign))
        if not is_said and not UNSEEN.match(ast.unparse(child)):
            yield child
            yield from nodes(child)


def section_of(source: str, line: int) -> int:
    """Return the number of the section that a line is in, 0 for one without a number."""
    heads = re.findall(r"^# --- (\d*)", "\n".join(source.splitlines()[:line]), re.MULTILINE)
    return int((heads or [0])[-1] or 0)


def all_mutants(source: str) -> list[tuple[int, int, int, str]]:
    """Return every change that we know: its section, its begin and end in bytes, the new code."""
    starts = [0, *itertools.accumulate(map(len, source.encode().splitlines(keepends=True)))]
    found = set()
    for old, code in (each for node in nodes(ast.parse(source)) for each in changes(node)):
        start = starts[old.lineno - 1] + old.col_offset
        end = starts[old.end_lineno - 1] + old.end_col_offset
        found.add((section_of(source, old.lineno), start, end, code))
    return sorted(found)


def tests_by_section(source: str) -> dict[int, list[str]]:
    """Return the tests that need no browser by their section."""
    found: dict[int, list[str]] = defaultdict(list)
    for group in ast.walk(ast.parse(source)):
        if isinstance(group, ast.ClassDef) and group.name.startswith("Test"):
            for test in [each for each in group.body if isinstance(each, ast.FunctionDef)]:
                needs = str([*map(ast.dump, group.decorator_list + test.decorator_list)])
                if test.name.startswith("test_") and not re.search("chromium|firefox", needs):
                    name = f"{TESTS[:-3]}.{group.name}.{test.name}"
                    found[section_of(source, group.lineno)].append(name)
    return found


def failure(clone: Path, tests: list[str], limit: float) -> str:
    """Run tests until one fails; return its name, or nothing when all pass."""
    command = ["nice", "-n", "19", sys.executable, "-m", "unittest", "-f", *tests]
    with Path(clone, "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=clone, stderr=log, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        with contextlib.suppress(ProcessLookupError):  # the tests, and what they have started
            os.killpg(process.pid, signal.SIGKILL)
        named = re.findall(r"^(?:FAIL|ERROR): (.*)", Path(log.name).read_text(), re.MULTILINE)
    return "" if process.wait() == 0 else [*named, "an error, or the time limit"][0]


def main() -> None:
    """Make mutants, run the tests on each, and print what survived."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=400)
    for name in ("--sections", "--only"):
        parser.add_argument(name, type=int, nargs="*", default=range(9999))
    options = parser.parse_args()
    os.environ["POPUP_TEST_ROUNDS"] = "3"
    source, tests = (Path(HERE, name).read_text() for name in (PROGRAM, TESTS))
    groups, outcomes = tests_by_section(tests), Counter[str]()
    sample = enumerate(random.Random(1).sample(all_mutants(source), options.count))
    chosen = [(n, *m) for n, m in sample if n in options.only and m[0] in options.sections]

    def run(number: int, section: int, start: int, end: int, code: str) -> None:
        text = (source.encode()[:start] + code.encode() + source.encode()[end:]).decode()
        others = [name for each, names in groups.items() if each != section for name in names]
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            clone = Path(folder, "clone")
            shutil.copytree(HERE, clone, ignore=shutil.ignore_patterns(".git", "__pycache__"))
            Path(clone, PROGRAM).write_text(text)
            name = failure(clone, groups[section], 150) or failure(clone, others, 500)
        outcomes[f"section {section:2}, {'killed' if name else 'survived'}"] += 1
        lines = difflib.unified_diff(source.splitlines(), text.splitlines(), n=1, lineterm="")
        verdict = [f"killed by {name}"] if name else ["SURVIVED", *lines]
        print(f"{number}, section {section}:", "\n".join(verdict), flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, *zip(*chosen)))
    print(*[f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())], sep="\n")


if __name__ == "__main__":
    main()
