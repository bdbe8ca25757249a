"""``intarsia chat MODEL [ADAPTER...]``: talk, and switch adapters while talking."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import given, terminal
from intarsia.errors import IntarsiaError, nearest

if TYPE_CHECKING:
    from intarsia.cli.conversation import Conversation
    from intarsia.deck import Deck
    from intarsia.pretrained import Pretrained


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, a hub id, or smollm2-135m.")
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER", help="Folders, NAME=FOLDER, or NAME@VERSION in the registry.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token; 0.7 is livelier.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample among the likeliest tokens of this total chance.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="No chat template: each line is continued as it stands (\\n breaks it).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object a line.")] = False,
) -> None:
    """Talk to a model. /use NAME, /off and /fuse A=0.6 B=0.4 switch adapters live; /help lists the rest."""
    found = given.read_adapters(adapters or [])
    from intarsia.cli.conversation import Conversation, Settings
    from intarsia.deck import Deck

    with terminal.progress() as progress:
        pretrained = given.load_base(found, model, progress) if found else given.load_model(model, progress)
        deck = Deck(pretrained.model)
        deck.add(*found.values())
    settings = Settings(max_new_tokens, temperature, top_p, seed, system)
    session = Session(Conversation(pretrained, settings, plain), deck, json)
    session.welcome(pretrained)
    if sys.stdin.isatty():
        _talk(session)
    elif not _follow(session):
        raise typer.Exit(2)


def _talk(session: Session) -> None:
    """Lines from a keyboard, until Ctrl-D or /quit. Ctrl-C clears the line."""
    _edit_lines(session)
    while True:
        try:
            line = input(session.prompt())
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        except EOFError:
            print()
            return
        try:
            if not session.hear(line):
                return
        except KeyboardInterrupt:  # the program goes on, only the answer or the switch ends
            print("(stopped)")
        except IntarsiaError as error:
            terminal.show_error(str(error))


def _follow(session: Session) -> bool:
    """Lines from a file or a pipe. -> whether all of them were understood."""
    understood = True
    for line in sys.stdin:
        line = line.rstrip("\r\n")
        if line.strip() and not session.json:
            print(f"{session.active()}> {line}", flush=True)
        try:
            if not session.hear(line):
                break
        except IntarsiaError as error:
            understood = False
            if session.json:
                session.tell(event="error", message=str(error))
            else:
                terminal.show_error(str(error))
    return understood


def _edit_lines(session: Session) -> None:
    """History, editing and Tab, where Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        return

    def complete(text: str, state: int) -> str | None:
        whole = readline.get_line_buffer()[: readline.get_endidx()]
        words = session.words(whole, text)
        return words[state] if state < len(words) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


@dataclass(frozen=True)
class Command:
    """One slash command."""

    usage: str
    help: str
    run: Callable[[Session, list[str]], bool | None]  # False ends the session


@dataclass
class Session:
    """What happens with a line: a slash command, or a turn of the conversation."""

    conversation: Conversation
    deck: Deck
    json: bool
    lively: bool = field(default_factory=lambda: sys.stdout.isatty())

    def welcome(self, pretrained: Pretrained) -> None:
        """Say on standard error what is here and how to go on."""
        if self.json:
            return
        out, model = terminal.messages(), pretrained.model
        count = sum(p.numel() for p in model.parameters())
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        out.print(f"[bold]{pretrained.name}[/]  {count / 1e6:.0f} M parameters, {dtype}, {model.device.type}")
        for name in self.deck.names:
            out.print(f"  [cyan]{name:{self._wide()}}[/]  {self._about(name)}")
        how = "/use NAME sets an adapter in, /off takes it out; " if self.deck.names else ""
        out.print(f"[dim]{how}/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.[/]")

    def _about(self, name: str) -> str:
        from intarsia.edits import where
        from intarsia.train.progress import size

        adapter = self.deck[name]
        method, inserts = adapter.method.get("name", "?"), adapter.inserts
        changes = adapter.touched or not inserts
        what = [f"{adapter.share:.2%} of {len(adapter.edits)} weights"] if changes else []
        what += [f"inserts {where(inserts)}"] if inserts else []
        return f"{method}, {', '.join(what)}, {size(adapter.bytes)}"

    def _wide(self) -> int:
        return max(map(len, self.deck.names), default=0)

    def active(self) -> str:
        """What is set in, in a few characters: ``base``, ``phonemes``, ``0.6 phonemes + 0.4 names``."""
        weights = self.deck.active
        if not weights:
            return "base"
        one = len(weights) == 1
        return " + ".join(n if one and w == 1 else f"{w:g} {n}" for n, w in weights.items())

    def prompt(self) -> str:
        """In colour; \\001 and \\002 tell readline which characters take no room."""
        return f"\001\033[1;36m\002{self.active()}\001\033[0m\002> "

    def words(self, line: str, word: str) -> list[str]:
        """How ``word``, the end of ``line``, may go on."""
        if not line.startswith("/"):
            return []
        if " " not in line:
            known = [f"/{name} " for name in COMMANDS]
        else:
            known = [f"{n}=" if line.startswith("/fuse") else n for n in self.deck.names]
        return [one for one in known if one.startswith(word)]

    def hear(self, line: str) -> bool:
        """Act on one line. -> whether to go on."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._answer(line)
            return True
        name, *words = line[1:].split() or [""]
        if name not in COMMANDS:
            close = nearest(name, COMMANDS).replace("'", "").replace("did you mean ", "did you mean /")
            raise IntarsiaError(f"unknown command /{name}; {close.replace(' or ', ' or /')}")
        return COMMANDS[name].run(self, words) is not False

    def tell(self, **event: Any) -> None:
        """One JSON object a line."""
        print(jsonlib.dumps(event, ensure_ascii=False), flush=True)

    # --- answers

    def _answer(self, line: str) -> None:
        pieces = self.conversation.say(line)
        if self.json:
            for _ in pieces:
                pass
            self.tell(event="answer", to=line, active=self.deck.active, **asdict(self.conversation.answer))
            return
        try:
            with contextlib.closing(pieces):  # at once, so that what came before Ctrl-C is part of the conversation
                for piece in pieces:
                    print(_visible(piece), end="", flush=True)
        finally:
            print()
        if self.lively:
            answer, out = self.conversation.answer, terminal.output()
            why = {"length": ", cut off by --max-new-tokens", "context": ", the context is full"}.get(answer.end, "")
            pace = answer.tokens / answer.seconds if answer.seconds else 0.0
            out.print(f"[dim]{answer.tokens} tokens, {pace:.0f} a second{why}[/]")

    # --- commands

    def use(self, words: list[str]) -> None:
        """/use NAME [STRENGTH]"""
        if len(words) not in (1, 2):
            raise IntarsiaError(f"/use takes a name and perhaps a strength: {COMMANDS['use'].usage}")
        self._switch(lambda: self.deck.use(words[0], _number(words[1]) if len(words) == 2 else 1.0))

    def fuse(self, words: list[str]) -> None:
        """/fuse NAME=WEIGHT ..."""
        weights: dict[str, float] = {}
        for word in words:
            name, sign, weight = word.rpartition("=")
            if not sign or name in weights:
                what = "is given twice" if sign else "has no weight"
                raise IntarsiaError(f"{word!r} {what}: {COMMANDS['fuse'].usage}")
            weights[name] = _number(weight)
        if not weights:
            raise IntarsiaError(f"/fuse takes names with weights: {COMMANDS['fuse'].usage}")
        self._switch(lambda: self.deck.fuse(weights))

    def off(self, words: list[str]) -> None:
        """/off"""
        self._switch(self.deck.off)

    def _switch(self, switch: Callable[[], None]) -> None:
        switch()
        self.conversation.forget_cache()
        milliseconds = self.deck.last_switch_seconds * 1000
        if self.json:
            self.tell(event="switch", active=self.deck.active, milliseconds=milliseconds)
        else:
            print(f"{self.active()}  ({milliseconds:.1f} ms)", flush=True)
            self._remind()

    def _remind(self) -> None:
        """An adapter that never saw the chat template will not show what it learned inside it."""
        shapes = {self.deck[name].note.get("shape of the rows") for name in self.deck.active}
        if shapes & {"prompt", "text"} and not self.conversation.plain:
            terminal.messages().print(
                "[dim]trained on rows without the chat template: /plain gives it lines as they stand[/]"
            )

    def at_hand(self, words: list[str]) -> None:
        """/list"""
        if self.json:
            adapters = {n: {"method": dict(self.deck[n].method), "bytes": self.deck[n].bytes} for n in self.deck.names}
            return self.tell(event="list", active=self.deck.active, adapters=adapters)
        active = self.deck.active
        for name in self.deck.names:
            weight = f"{active[name]:g}" if name in active else ""
            print(f"{'*' if name in active else ' '} {name:{self._wide()}}  {weight:4} {self._about(name)}")
        if not self.deck.names:
            print("no adapters; name their folders after the model: intarsia chat MODEL ADAPTER...")
        return None

    def plain(self, words: list[str]) -> None:
        """/plain"""
        self.conversation.set_plain(not self.conversation.plain)
        if self.json:
            return self.tell(event="plain", plain=self.conversation.plain)
        told = (
            "each line is continued as it stands" if self.conversation.plain else "a conversation, by the chat template"
        )
        return print(told)

    def reset(self, words: list[str]) -> None:
        """/reset"""
        self.conversation.reset()
        self.tell(event="reset") if self.json else print("a new conversation")

    def help(self, words: list[str]) -> None:
        """/help"""
        if self.json:
            return self.tell(event="help", commands={c.usage: c.help for c in COMMANDS.values()})
        wide = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            print(f"  {command.usage:{wide}}  {command.help}")
        return None


COMMANDS = {
    "use": Command("/use NAME [STRENGTH]", "set one adapter in", Session.use),
    "off": Command("/off", "take out what is set in: the base, to the bit", Session.off),
    "fuse": Command("/fuse NAME=0.6 NAME=0.4", "set in a weighted sum", Session.fuse),
    "list": Command("/list", "the adapters at hand", Session.at_hand),
    "plain": Command("/plain", "continue each line as it stands; once more: hold a conversation again", Session.plain),
    "reset": Command("/reset", "forget the conversation", Session.reset),
    "help": Command("/help", "this list", Session.help),
    "quit": Command("/quit", "leave", lambda session, words: False),
}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise IntarsiaError(f"{text!r} is not a number; for example 0.6") from None


def _visible(text: str) -> str:
    """Without characters that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
