"""What runbooks tell people to type exists: commands with their options, settings, pages and sections."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import deployments.main  # noqa: F401 - adds its commands
from slipstream.cli import app
from slipstream.config import settings_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/operations").glob("*.md"))

# Of clients, and where settings are; all others are settings.
OTHERS = {"SLIPSTREAM_URL", "SLIPSTREAM_API_KEY", "SLIPSTREAM_CONFIG"}
_FENCE = re.compile(r"^[ ]*```[a-z]*\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(slipstream [a-z][^`]*)`")


def commands(page: str) -> Iterator[str]:
    """Every command line of ours: in fenced blocks, continued lines joined, and in the text."""
    for block in _FENCE.findall(page):
        for line in block.replace("\\\n", " ").splitlines():
            without_environment = re.sub(r"^(\s*[A-Z_]+=\S+\s+)*", "", line).strip()
            if without_environment.startswith("slipstream "):
                yield without_environment
    yield from (found for found in _INLINE.findall(_FENCE.sub("", page)))


def parse(line: str) -> None:
    """As a shell and the command line would. Raises what they do."""
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    command: Any = typer.main.get_command(app)
    context = command.make_context("slipstream", list(words))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if rest == ["…"]:
            return
        assert rest, f"{line}: names a group and no command"
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_parse(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        try:
            parse(line)
        except Exception as error:
            raise AssertionError(f"{page.name}: {line}: {error}") from error


def test_there_are_many() -> None:
    assert sum(len(list(commands(page.read_text(encoding="utf-8")))) for page in PAGES) > 60


@pytest.mark.parametrize(
    "line",
    [
        "slipstream registry backup",
        "slipstream registry back-up PLACE",
        "slipstream registry backup PLACE --kept 3",
        "slipstream registry backup PLACE --keep some",
        "slipstream registry",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(BaseException):  # noqa: B017, PT011 - of the parser's many kinds
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_settings_are_ours(page: Path) -> None:
    known = set(re.findall(r"`(SLIPSTREAM_[A-Z_]+)`", settings_table())) | OTHERS
    assert set(re.findall(r"\bSLIPSTREAM_[A-Z_]+\b", page.read_text(encoding="utf-8"))) <= known


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"
