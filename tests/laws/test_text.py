"""The repository stands alone: no trace of the machine it was written on, no package host, no unexplained reference."""

import re
from pathlib import Path

import pytest

from tests.laws.sources import git_files, relative

# Each pattern is spelled so that it does not match this file.
BANNED = {
    "a path of one machine": r"(?<![\w.])/(?:wor[k]\b|(?:hom[e]|roo[t]|User[s])/\w)",
    "a package host": r"pypi[.](?:org|python)|pythonhosted[.]|download[.]pytorch|anaconda[.]org|--(?:extra-)?index[-]url",
    "how it was written": r"\bfar[m]-\w|\.librar[y]/|\bsub-?agen[t]s?\b|\b(?i:claud[e]|anthropi[c])\b|\bhelper sessio[n]|\bthe lea[d] will",
    "a file that is not here": r"\bDESIGN[.]md\b|\.\./share[d]\b",
    "a merge left over": r"^(?:<{7}|>{7}) ",
    "a mark of an edit": r"\{\{[A-Z]{3,} |\b(?:TOD[O]|FIXM[E])\b: ",
}
MAX_BYTES = 25_000_000


def banned(text: bytes) -> list[str]:
    """What a file must not say, as messages; works on binary files too, which remember paths of their own."""
    return [
        f"{reason}: {found.group().decode(errors='replace')}"
        for reason, pattern in BANNED.items()
        for found in re.finditer(pattern.encode(), text, re.MULTILINE)
    ]


def test_git_lists_the_project() -> None:
    assert {"pyproject.toml", "passes/__init__.py", "tests/laws/test_text.py"} <= set(map(relative, git_files()))


def test_files_say_nothing_banned() -> None:
    found = {relative(path): banned(path.read_bytes()) for path in git_files()}
    assert {name: reasons for name, reasons in found.items() if reasons} == {}


def test_no_file_is_large() -> None:
    assert [relative(path) for path in git_files() if path.stat().st_size > MAX_BYTES] == [], "git keeps every version for ever"


@pytest.mark.parametrize(
    "words",
    [
        "see /wor" + "k/main",
        "open('/hom" + "e/me/x')",
        "https://pypi" + ".org/simple",
        "as DESIGN" + ".md says",
        "far" + "m-bench",
        "<<<<<<" + "< HEAD",
        "{" + "{OLD `python",
    ],
)
def test_banned_words_are_seen(words: str) -> None:
    assert banned(words.encode()) != []


def test_other_words_are_not() -> None:
    text = Path("/frame" + "work/x").as_posix() + " ort.InferenceSession(...) blocks.0/work/q http://www.apache.org/licenses/ a farm"
    assert banned(text.encode()) == []
