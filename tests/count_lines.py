"""Counts the lines of code of the package and the scripts, without blank lines, comments, and
docstrings. Run it as `python -m tests.count_lines`."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]

SKIPPED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def count_lines(source: str) -> int:
    """Returns the number of lines of code in a Python source."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines.difference_update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return len(lines)


def main() -> None:
    counts = {}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("taming_jax/**/*.py"), *ROOT.glob("scripts/*.py")]:
        counts[file.relative_to(ROOT)] = count_lines(file.read_text(encoding="utf-8"))
    for file, count in sorted(counts.items(), key=lambda item: item[1]):
        print(f"{count:6} {file}")
    print(f"{sum(counts.values()):6} in total")


if __name__ == "__main__":
    main()
