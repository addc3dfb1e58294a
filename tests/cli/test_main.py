"""The command group: speed, help, and what becomes of errors."""

import subprocess
import sys
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from shoal.cli import get
from shoal.cli.main import SECTIONS, cli

COMMANDS = [name for entries in SECTIONS.values() for name in entries]


def test_help_imports_no_heavy_package() -> None:
    """Listing the commands loads neither torch nor grpc nor the API's types."""
    program = (
        "import sys\n"
        "from shoal.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'grpc', 'pydantic', 'transformers', 'httpx', 'rich', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "[]\n"
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    """Each command exists under its name and explains itself."""
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert f"Usage: cli {name}" in done.output or f"Usage: shoal {name}" in done.output


def test_no_command_imports_torch_or_grpc_on_help() -> None:
    """The help of every command stays light too."""
    program = (
        "import sys\n"
        "from shoal.cli.main import cli\n"
        f"for name in {COMMANDS!r}:\n"
        "    cli.main([name, '--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'grpc'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "[]\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    """A typo exits 2 and names the typo."""
    done = CliRunner().invoke(cli, ["gett"])
    assert done.exit_code == 2
    assert "gett" in done.stderr


def test_an_unexpected_error_is_a_sentence(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback reaches the user, unless SHOAL_DEBUG asks for it."""

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the cat sat on it")

    monkeypatch.setattr(get, "_listings", fail)
    done = world.shoal("get")
    assert done.exit_code == 1
    assert "RuntimeError: the cat sat on it" in done.stderr
    assert "SHOAL_DEBUG=1" in done.stderr
    assert "Traceback" not in done.stderr
    assert isinstance(world.shoal("get", debug=True).exception, RuntimeError)


def test_a_missing_package_names_the_install(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room that is not installed is named with the command that installs it."""

    def fail(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(get, "_listings", fail)
    done = world.shoal("get")
    assert done.exit_code == 1
    assert "'torch'" in done.stderr
    assert "pip install" in done.stderr


def test_ctrl_c_exits_130(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted command says nothing and exits as shells expect."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(get, "_listings", interrupt)
    done = world.shoal("get")
    assert done.exit_code == 130
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(world: Any, shell: str) -> None:
    """The script of each shell calls shoal back."""
    done = world.shoal("completion", shell)
    assert done.exit_code == 0
    assert "_SHOAL_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("shoal des", ["describe"]),
        ("shoal describe ", ["chat", "chess"]),
        ("shoal scale che", ["chess"]),
        ("shoal logs chat", ["chat", "chat-abc12-0"]),
        ("shoal get --out", ["--output"]),
        ("shoal serve --max-n", ["--max-num-seqs"]),
    ],
)
def test_the_shell_completes(
    world: Any, monkeypatch: pytest.MonkeyPatch, words: str, completions: list[str]
) -> None:
    """Commands, flags, and the names of what there is."""
    world.shoal("apply", "-f", world.write("chat"), "-f", world.write("chess"))
    world.pod()
    monkeypatch.setenv("SHOAL_STATE_DIR", str(world.store.root))
    *args, incomplete = words.split(" ")[1:]
    found = ShellComplete(cli, {}, "shoal", "_SHOAL_COMPLETE").get_completions(args, incomplete)
    assert [item.value for item in found] == completions


def test_version_as_json(world: Any) -> None:
    """Programs can read the version."""
    import json

    assert json.loads(world.shoal("version", "-o", "json").stdout)["apiVersion"].startswith(
        "serving.shoal.dev/"
    )
