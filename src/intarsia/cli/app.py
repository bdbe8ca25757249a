"""``intarsia``: all commands, and how a mistake is told: one line, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from intarsia._version import __version__
from intarsia.cli import bench, registry, terminal
from intarsia.cli.chat import chat
from intarsia.cli.check import check
from intarsia.cli.compress import compress
from intarsia.cli.convert import convert
from intarsia.cli.demo import demo
from intarsia.cli.evaluate import evaluate
from intarsia.cli.merge import merge
from intarsia.cli.methods import methods
from intarsia.cli.repair import repair
from intarsia.cli.show import show
from intarsia.cli.shrink import shrink
from intarsia.cli.train import train
from intarsia.errors import ElsewhereError, IntarsiaError, nearest

# Newer versions of typer carry click inside, older ones depend on it: this is the class of its errors in both.
UsageError: type[Exception] = typer.BadParameter.__mro__[2]


class Commands(TyperGroup):
    """The commands in their own order; every failure becomes one message and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise IntarsiaError(f"no command {args[0]!r}; {nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # here, because typer itself would swallow what it has to say
            if terminal.is_first():
                terminal.messages().print(str(error) or "interrupted", markup=False, soft_wrap=True)
            raise typer.Exit(getattr(error, "exit_code", terminal.INTERRUPTED)) from error

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        options["standalone_mode"] = False  # errors come here instead of being printed with a frame around them
        try:
            code = super().main(args, *rest, **options)
        except SystemExit:
            raise
        except BaseException as error:
            sys.exit(report(error))
        sys.exit(code if isinstance(code, int) else 0)


def report(error: BaseException) -> int:
    """Say what went wrong, in one message. -> the exit code: 2 for the user's mistakes, 130 for Ctrl-C, 1 for a bug."""
    if isinstance(error, IntarsiaError):
        if terminal.is_first() or _is_its_own(error):
            terminal.show_error(str(error))
        return 2
    if isinstance(error, UsageError):
        terminal.show_error(_usage(error))
        return 2
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        terminal.messages().print("interrupted")
        return terminal.INTERRUPTED
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        terminal.show_error(f"{error.strerror or error}{place}")
        return 2
    more = "" if terminal.debugging() else f"; {terminal.DEBUG}=1 shows where"
    terminal.show_error(f"unexpected {type(error).__name__}: {error}\nThis is a fault of intarsia, not yours{more}.")
    return 1


def _is_its_own(error: IntarsiaError) -> bool:
    """Whether the first process does not tell of this too: before they know of each other all make the same mistakes."""
    processes = sys.modules.get("intarsia.processes")
    return processes is not None and processes.started() and not isinstance(error, ElsewhereError)


def _usage(error: Any) -> str:
    """Typer's message, in our manner, with the nearest option and the way to the help."""
    context = error.ctx
    message = str(error.format_message()).rstrip(".")
    wrong = getattr(error, "option_name", None)
    if wrong and type(error).__name__ == "NoSuchOption":
        known = [o for p in context.command.params for o in p.opts if o.startswith("--")] + ["--help"]
        message = f"no option {wrong}; {nearest(wrong, known)}".replace("'", "")
    message = message[:1].lower() + message[1:]
    return f"{message} ({context.command_path} --help)" if context else message


app = typer.Typer(
    name="intarsia",
    cls=Commands,
    help="Sparse high-rank adapters: train them, set them into the base weights, take them out to the bit.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"intarsia {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def intarsia(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "chat": chat,
    "show": show,
    "merge": merge,
    "repair": repair,
    "compress": compress,
    "shrink": shrink,
    "convert": convert,
    "methods": methods,
    "check": check,
}
for name, command in COMMANDS.items():
    app.command(name)(command)

BENCHMARKS: dict[str, Callable[..., None]] = {"train": bench.train, "methods": bench.methods, "switch": bench.switch}


def _group(name: str, help: str, commands: dict[str, Callable[..., None]]) -> None:
    """Commands below a command, which alone prints its help."""
    group = typer.Typer(cls=Commands, help=help)

    @group.callback(invoke_without_command=True)
    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    for word, command in commands.items():
        group.command(word)(command)
    app.add_typer(group, name=name)


_group("registry", "Adapters by name and version.", registry.COMMANDS)
_group("bench", "Benchmarks, side by side in one run.", BENCHMARKS)


def main() -> None:
    """The entry point of the installed command."""
    terminal.hush()
    app(prog_name="intarsia")
