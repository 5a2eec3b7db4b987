"""The command line against the application itself, in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from support.api_app import ADMIN_KEY, BASE, ApiWorld, write_adapter
from typer.testing import CliRunner, Result

from adapter_registry.records import Outcome, Watch
from slipstream.cli import app


class Shell:
    """Runs commands with a key in the environment."""

    def __init__(self, world: ApiWorld) -> None:
        self.world = world
        self.key = asyncio.run(world.key())

    def __call__(self, *arguments: str, key: str | None = None) -> Result:
        transport = httpx.ASGITransport(self.world.app)
        environment = {
            "SLIPSTREAM_URL": "http://test",
            "SLIPSTREAM_API_KEY": self.key if key is None else key,
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }
        result = CliRunner().invoke(app, list(arguments), env=environment, obj=transport)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert "Traceback" not in result.output
        return result


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(ApiWorld(tmp_path / "uploads"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def test_push_list_show_rm(shell: Shell, folder: Path) -> None:
    assert "No adapters yet" in shell("adapters", "list").stdout
    pushed = shell("adapters", "push", str(folder), "--name", "sql")
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout == "Published sql@1  (lora, rank 2)\n"
    assert "Already published as sql@1" in shell("adapters", "push", str(folder), "--name", "sql").stdout
    assert "sql" in shell("adapters", "list").stdout
    assert "sql@1" in shell("adapters", "show", "sql").stdout
    assert shell("adapters", "rm", "sql/1").stdout == "Removed sql@1\n"
    assert shell("adapters", "show", "sql").exit_code == 1


def test_json_for_scripts(shell: Shell, folder: Path) -> None:
    pushed = json.loads(shell("adapters", "push", str(folder), "--name", "sql", "--json").stdout)
    assert (pushed["version"], pushed["new"]) == (1, True)
    assert json.loads(shell("adapters", "list", "--json").stdout)[0]["name"] == "sql"
    assert json.loads(shell("adapters", "show", "sql", "--json").stdout)["current"] == 1
    assert json.loads(shell("adapters", "rm", "sql", "--json").stdout)["versions"] == [1]


def test_speculation_of_a_version(shell: Shell, folder: Path) -> None:
    shell("adapters", "push", str(folder), "--name", "sql")
    done = shell("adapters", "speculation", "sql/1", "off", "--reason", "accepts too few [drafts]")
    assert done.stdout == "Speculation of sql@1 is off\n"
    shown = shell("adapters", "show", "sql").stdout
    assert "Speculation off: sql@1: accepts too few [drafts]" in shown
    changed = json.loads(shell("adapters", "speculation", "sql@1", "on", "--json").stdout)
    assert changed["speculation"] == {"enabled": True, "reason": ""}
    assert "Speculation off" not in shell("adapters", "show", "sql").stdout


def test_the_policy_is_a_column(shell: Shell) -> None:
    asyncio.run(shell.world.publish("sql"))
    row = shell("adapters", "show", "sql").stdout.splitlines()[-1]
    assert row.split()[-1] == "-"  # a plain LoRA has nothing to draft with
    shell("adapters", "speculation", "sql@1", "off")
    assert shell("adapters", "show", "sql").stdout.splitlines()[-1].split()[-1] == "off"


def test_pull_brings_every_file(shell: Shell, folder: Path, tmp_path: Path) -> None:
    (folder / "training_card.md").write_text("# Card")
    shell("adapters", "push", str(folder), "--name", "sql")
    target = tmp_path / "new" / "folder"
    pulled = shell("adapters", "pull", "sql", str(target))
    assert pulled.stdout == f"sql@1 is in {target}: 3 files (lora, rank 2)\n"
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert json.loads(shell("adapters", "pull", "sql@1", str(target), "--json").stdout)["ref"] == "sql@1"
    assert shell("adapters", "push", str(target), "--name", "copy").stdout.startswith("Published copy@1")


def test_hidden_files_stay_here(shell: Shell, folder: Path) -> None:
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    assert shell("adapters", "push", str(folder), "--name", "sql").exit_code == 0


def test_folders_and_links_are_refused_by_name(shell: Shell, folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    assert "checkpoint-10 is a folder" in shell("adapters", "push", str(folder), "--name", "sql").stderr
    (folder / "checkpoint-10").rmdir()
    (folder / "README.md").symlink_to(folder / "adapter_config.json")
    result = shell("adapters", "push", str(folder), "--name", "sql")
    assert result.exit_code == 1
    assert "README.md is a link" in result.stderr


def test_the_base_can_be_named(shell: Shell, folder: Path) -> None:
    assert shell("adapters", "push", str(folder), "--name", "sql", "--base", "base-1b").exit_code == 0
    refused = shell("adapters", "push", str(folder), "--name", "sql", "--base", "other")
    assert "No base model 'other'" in refused.stderr


def test_the_admin_acts_for_a_tenant(shell: Shell, folder: Path) -> None:
    bare = shell("adapters", "list", key=ADMIN_KEY)
    assert bare.exit_code == 1
    assert "X-Slipstream-Tenant" in bare.stderr
    arguments = ("adapters", "push", str(folder), "--name", "sql", "--as-tenant", "acme")
    assert shell(*arguments, key=ADMIN_KEY).exit_code == 0
    assert "sql" not in shell("adapters", "list").stdout


def test_keys(shell: Shell) -> None:
    made = shell("keys", "create", "--tenant", "acme", "--label", "ci", key=ADMIN_KEY)
    assert made.exit_code == 0
    secret = made.stdout.strip()
    assert shell("adapters", "list", key=secret).exit_code == 0
    listed = shell("keys", "list", "--tenant", "acme", key=ADMIN_KEY)
    assert "ci" in listed.stdout
    assert secret not in listed.output
    key_id = json.loads(shell("keys", "list", "--tenant", "acme", "--json", key=ADMIN_KEY).stdout)[0]["id"]
    assert shell("keys", "revoke", key_id, "--tenant", "acme", key=ADMIN_KEY).exit_code == 0
    assert shell("adapters", "list", key=secret).exit_code == 1
    assert json.loads(shell("keys", "create", "--tenant", "b", "--json", key=ADMIN_KEY).stdout)["secret"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("adapters", "push", "/nowhere/at/all", "--name", "x"), "is not a folder"),
        (("adapters", "show", "nobody"), "'nobody'"),
        (("adapters", "show", ".."), "not a valid adapter name"),
        (("adapters", "rm", "sql@prod"), "version's number"),
        (("adapters", "speculation", "sql", "off"), "version's number too"),
        (("adapters", "speculation", "sql@prod", "off"), "version's number"),
        (("adapters", "speculation", "sql@1", "off"), "no version 1 of 'sql'"),
        (("adapters", "speculation", "sql@1", "off", "--reason", "\udcff"), "not text"),
        (("adapters", "pull", "nobody", "/nowhere"), "'nobody'"),
        (("adapters", "pull", "Bad Name", "/nowhere"), "not a valid adapter name"),
        (("keys", "create", "--tenant", "x"), "role 'publisher', and this needs 'admin'"),
        (("adapters", "list", "--api-key", "wrong"), "unknown or has been revoked"),
        (("adapters", "list", "--api-key", ""), "No key"),
        (("adapters", "list", "--api-key", "sk-slip-…"), "API key holds a character"),
        (("adapters", "list", "--api-key", "sk\n"), "API key holds a character"),
        (("adapters", "list", "--as-tenant", "é"), "tenant holds a character"),
        (("adapters", "show", "\udcff"), "not a valid adapter name"),
        (("keys", "create", "--tenant", "x", "--label", "\udcff"), "not text"),
    ],
)
def test_refusals_are_a_sentence_and_exit_1(shell: Shell, arguments: tuple[str, ...], says: str) -> None:
    result = shell(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert says in result.stderr


def test_a_broken_adapter_says_which_rule(shell: Shell, tmp_path: Path) -> None:
    result = shell("adapters", "push", str(write_adapter(tmp_path / "nan", nan=True)), "--name", "sql")
    assert result.exit_code == 1
    assert "finite" in result.stderr.lower() or "nan" in result.stderr.lower()


def test_an_empty_folder_is_refused(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no files" in shell("adapters", "push", str(tmp_path / "empty"), "--name", "x").stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://no-such-host.invalid"])
def test_no_server_is_exit_3(url: str) -> None:
    result = CliRunner().invoke(app, ["adapters", "list", "--url", url, "--api-key", "x"])
    assert result.exit_code == 3
    assert f"Cannot reach {url}" in result.stderr


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://"])
def test_a_bad_url_is_exit_1(url: str) -> None:
    result = CliRunner().invoke(app, ["adapters", "list", "--url", url, "--api-key", "x"])
    assert result.exit_code == 1, result.output
    assert "is not a URL" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("adapters", "--help"),
        ("adapters", "push", "--help"),
        ("keys", "create", "--help"),
        ("tenants", "set", "--help"),
    ],
)
def test_help_teaches(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Usage" in result.output
    if len(arguments) == 3:
        assert "Example" in result.output
        assert "SLIPSTREAM_API_KEY" in result.output


def test_wrong_usage_is_exit_2() -> None:
    assert CliRunner().invoke(app, ["adapters", "push"]).exit_code == 2
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["adapters", "speculation", "sql@1", "maybe"]).exit_code == 2


def test_version() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("slipstream ")


def test_keys_of_a_role_rotate_and_end(shell: Shell) -> None:
    made = shell(
        "keys", "create", "--tenant", "demo", "--role", "admin", "--expires-at", "2999-01-31T00:00:00Z", key=ADMIN_KEY
    )
    own = made.stdout.strip()
    assert shell("keys", "create", "--role", "caller", "--model", "sql", "--label", "app", key=own).exit_code == 0
    found = json.loads(shell("keys", "list", "--json", key=own).stdout)
    app_key = next(key for key in found if key["label"] == "app")
    assert (app_key["role"], app_key["models"]) == ("caller", ["sql"])
    rotated = shell("keys", "rotate", app_key["id"], "--grace-s", "0", key=own)
    assert rotated.stdout.startswith("sk-slip-")
    table = shell("keys", "list", key=own).stdout
    assert "LAST USED" in table
    assert "2999-01-31 00:00" in table
    assert shell("keys", "list", key=rotated.stdout.strip()).exit_code == 1  # a caller's


def test_tenants_limits_and_usage(shell: Shell) -> None:
    assert "Nothing was used" in shell("usage").stdout
    shown = shell("tenants", "set", "demo", "--requests-per-minute", "600", "--weight", "2", key=ADMIN_KEY).stdout
    assert shown.splitlines()[-1].split() == ["demo", "600", "–", "–", "–", "–", "2", "–"]
    changed = shell("tenants", "set", "demo", "--tokens-per-month", "5000", "--requests-per-minute", "0", key=ADMIN_KEY)
    assert changed.stdout.splitlines()[-1].split() == ["demo", "–", "–", "–", "5,000", "–", "2", "–"]
    assert (
        shell("tenants", "set", "demo", "--log-prompts", key=ADMIN_KEY).stdout.splitlines()[-1].split()[-1] == "logged"
    )
    kept = shell("tenants", "set", "demo", "--weight", "2", "--json", key=ADMIN_KEY).stdout
    assert json.loads(kept)[0]["log_prompts"] is True, "what is left out stays as it is"
    assert shell("tenants", "set", "demo", "--no-log-prompts", key=ADMIN_KEY).stdout.splitlines()[-1].split()[-1] == "–"
    assert json.loads(shell("tenants", "list", "--json", key=ADMIN_KEY).stdout)[0]["quota"]["tokens_per_month"] == 5000
    assert shell("tenants", "list").exit_code == 1

    async def ask() -> None:
        async with shell.world.client(shell.key) as client:
            await client.post("/v1/completions", json={"model": BASE, "prompt": "one two", "max_tokens": 3})
        await shell.world.app.state.runtime.meter.flush()

    asyncio.run(ask())
    assert shell("usage").stdout.splitlines()[-1].split()[:4] == ["total", "1", "2", "3"]
    assert shell("usage", "--csv").stdout.splitlines()[0].startswith("day,model,requests,prompt_tokens")
    assert json.loads(shell("usage", "--json").stdout)["total"]["requests"] == 1
    assert "start" in shell("usage", "--start", "soon").stderr


def test_labels(shell: Shell, folder: Path) -> None:
    assert shell("adapters", "push", str(folder), "--name", "sql", "--label", "team=search").exit_code == 0
    assert "Labels of sql@1: team=search" in shell("adapters", "show", "sql").stdout
    assert shell("adapters", "label", "sql@1", "team=ads", "stage=new").stdout == "sql@1: team=ads, stage=new\n"
    assert shell("adapters", "list", "--label", "team=search").stdout.startswith("No adapters")
    assert "sql" in shell("adapters", "list", "--label", "team=ads", "--label", "stage=new").stdout
    assert "key=value" in shell("adapters", "label", "sql@1", "team").stderr
    assert "sql@3" in shell("adapters", "label", "sql", "team=ads").stderr
    assert shell("adapters", "label", "sql@1").stdout == "sql@1: no labels\n"


def test_aliases_sharing_and_who_did_it(shell: Shell, folder: Path, tmp_path: Path) -> None:
    shell("adapters", "push", str(folder), "--name", "sql")
    shell("adapters", "push", str(write_adapter(tmp_path / "other", seed=5)), "--name", "sql")
    assert shell("aliases", "set", "sql", "prod", "1").stdout == "sql@prod is sql@1\n"
    assert shell("aliases", "set", "sql", "prod", "2").exit_code == 0
    assert shell("aliases", "rollback", "sql", "prod").stdout == "sql@prod is sql@1 again\n"
    assert len(json.loads(shell("aliases", "log", "sql", "--json").stdout)) == 3
    assert "FROM" in shell("aliases", "log", "sql").stdout
    split = shell("aliases", "set", "sql", "prod", "1", "--split", "2=0.1")
    assert split.stdout == "sql@prod is sql@1, 10% of it sql@2\n"
    assert "VERSION=PART" in shell("aliases", "set", "sql", "prod", "1", "--split", "half").stderr
    assert shell("aliases", "rollback", "sql", "prod").stdout == "sql@prod is sql@1 again\n"
    assert shell("adapters", "share", "sql", "--with", "globex").stdout == "sql may be called by globex\n"
    assert shell("adapters", "share", "sql", "--public").stdout == "sql may be called by every tenant\n"
    assert shell("adapters", "share", "sql").stdout == "sql may be called by nobody else\n"
    assert shell("aliases", "rm", "sql", "prod").exit_code == 0
    assert shell("audit").exit_code == 1  # a publisher's key
    shown = shell("audit", "--tenant", "demo", "--limit", "20", key=ADMIN_KEY).stdout
    assert "version.published" in shown
    assert json.loads(shell("audit", "--tenant", "demo", "--json", key=ADMIN_KEY).stdout)[0]["detail"] == "1 to none"


def test_rollouts_and_webhooks(shell: Shell, folder: Path, tmp_path: Path) -> None:
    shell("adapters", "push", str(folder), "--name", "sql")
    shell("adapters", "push", str(write_adapter(tmp_path / "other", seed=5)), "--name", "sql")
    assert "has a split or a guard" in shell("aliases", "outcomes", "sql").stdout
    done = shell("aliases", "set", "sql", "prod", "1", "--split", "2=0.1", "--shadow", "--max-error-rate", "0.05")
    assert done.stdout == "sql@prod is sql@1, 10% of it shadowed by sql@2, watched\n"
    assert "--split" in shell("aliases", "set", "sql", "prod", "1", "--shadow").stderr
    adapter = json.loads(shell("adapters", "show", "sql", "--json").stdout)
    assert adapter["splits"]["prod"] == {"version": 2, "weight": 0.1, "shadow": True}
    assert adapter["guards"]["prod"]["max_error_rate"] == 0.05
    watch = Watch(tenant="demo", name="sql", alias="prod")
    counted = Outcome(requests=4, errors=1, drafted_tokens=10, accepted_tokens=7, compared=2, same=1)
    asyncio.run(shell.world.store.note_outcome(watch, 2, counted, "told"))
    row = shell("aliases", "outcomes", "sql").stdout.splitlines()[-1].split()
    assert row == ["sql@prod", "2", "4", "1", "70%", "50%"]

    assert shell("webhooks", "add", "https://example.com/x").exit_code == 1, "a publisher's key"
    admin = shell("keys", "create", "--tenant", "demo", "--role", "admin", key=ADMIN_KEY).stdout.strip()
    assert "No webhooks" in shell("webhooks", "list", key=admin).stdout
    made = shell("webhooks", "add", "https://example.com/x", "--event", "alias.moved", key=admin)
    assert made.stdout.startswith("whsec_")
    [listed] = json.loads(shell("webhooks", "list", "--json", key=admin).stdout)
    assert listed["events"] == ["alias.moved"]
    assert "https://example.com/x" in shell("webhooks", "list", key=admin).stdout
    assert shell("webhooks", "rm", listed["id"], key=admin).exit_code == 0
    assert shell("webhooks", "rm", listed["id"], key=admin).exit_code == 1


def test_users(shell: Shell) -> None:
    assert "no users" in shell("users", "list", "--tenant", "demo", key=ADMIN_KEY).stdout
    done = shell("users", "set", "ann@example.com", "--role", "caller", "--tenant", "demo", key=ADMIN_KEY)
    assert done.stdout == "ann@example.com is caller of demo\n"
    make = ("keys", "create", "--tenant", "demo", "--user", "ann@example.com")
    assert "lower role" in shell(*make, key=ADMIN_KEY).stderr
    assert shell(*make, "--role", "caller", key=ADMIN_KEY).stdout.startswith("sk-slip-")
    assert "ann@example.com" in shell("keys", "list", "--tenant", "demo", key=ADMIN_KEY).stdout
    assert json.loads(shell("users", "list", "--tenant", "demo", "--json", key=ADMIN_KEY).stdout)[0]["role"] == "caller"
    removed = shell("users", "rm", "ann@example.com", "--tenant", "demo", key=ADMIN_KEY)
    assert removed.stdout == "Removed ann@example.com and revoked 1 keys\n"
    assert shell("users", "list").exit_code == 1, "a publisher's key"
