"""Extraction with a tiny Llama: its rows, in the order of their provenance, once and whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jax_sae.backbones.llama import load_llama
from jax_sae.data import open_activations
from jax_sae.errors import InputError
from train import cli
from train import extract as extract_module
from train.extract import ExtractConfig, extract

GOLDEN = Path(__file__).parents[1] / "goldens" / "llama_tied.npz"
WORDS = [f"w{i}" for i in range(61)]


def write_model(folder: Path, scale: float = 1.0, words: list[str] = WORDS) -> Path:
    """The tiny Llama of the golden file with a tokenizer of one token a word."""
    folder.mkdir()
    with np.load(GOLDEN) as file:
        weights = {name: file[name] for name in file.files if name.endswith(".weight")}
        (folder / "config.json").write_bytes(file["config"].tobytes())
    weights["model.embed_tokens.weight"] *= scale
    save_file(weights, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with the model and 20 documents of 40 random words."""
    folder = tmp_path_factory.mktemp("extract")
    write_model(folder / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(WORDS[i] for i in rng.integers(0, 61, 40)) for _ in range(20)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture
def config(here, tmp_path) -> ExtractConfig:
    """27 windows of 12 tokens: not a whole number of batches of 4."""
    return ExtractConfig(
        model=str(here / "model"),
        layer=2,
        inputs=(str(here / "texts.jsonl"),),
        out=tmp_path / "set",
        tokens=27 * 12,
        sequence_length=12,
        batch_size=4,
        dtype="float32",
        holdout=0.2,
    )


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """20 rows of 24 float32 numbers: less than one batch."""
    monkeypatch.setattr(extract_module, "_SHARD_BYTES", (20 * 96, 20 * 96))


def changed(config: ExtractConfig, **changes) -> ExtractConfig:
    return ExtractConfig(**{name: getattr(config, name) for name in config.__dataclass_fields__} | changes)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_rows_are_the_residual_stream_of_their_tokens(config, here, small_shards, capsys):
    activations = open_activations(extract(config))
    assert (activations.rows, activations.d, activations.tokens_per_item) == (27 * 11, 24, 11)
    provenance = activations.provenance
    expected = np.asarray(load_llama(here / "model").residual(np.array(provenance.tokens), 2))[:, 1:]
    np.testing.assert_allclose(activations.read(0, 27 * 11), expected.reshape(-1, 24), atol=1e-5)
    assert activations.source["layer"] == 2 and activations.source["model"] == str(here / "model")
    assert "297 rows of 24 numbers from 27 contexts" in capsys.readouterr().out


def test_every_row_is_found_in_its_document(config, here):
    activations = open_activations(extract(config))
    texts = [json.loads(line)["text"].split() for line in (here / "texts.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.from_file(str(activations.provenance.tokenizer_path))
    for row in (0, 10, 11, 150, 296):
        item, position, document, offset = activations.provenance.locate(row)
        token = tokenizer.id_to_token(int(activations.provenance.tokens[item, position]))
        assert token == texts[int(document.split(":")[1]) - 1][offset]


def test_held_out_rows_and_statistics_of_the_others(config):
    activations = open_activations(extract(config))
    assert activations.holdout_rows == 5 * 11
    items = activations.provenance.items
    assert not set(items[:-5, 0]) & set(items[-5:, 0])
    training = activations.read(0, activations.train_rows).astype(np.float64)
    np.testing.assert_allclose(activations.statistics.mean, training.mean(0), atol=1e-6)
    np.testing.assert_allclose(activations.statistics.variance, training.var(0), rtol=1e-5)


def test_bfloat16(config):
    whole = open_activations(extract(config))
    halved = open_activations(extract(changed(config, dtype="bfloat16", out=config.out.with_name("halved"))))
    assert halved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(halved.read(0, 297), whole.read(0, 297).astype(jnp.bfloat16))


def test_positions_left_out(config):
    activations = open_activations(extract(changed(config, skip_first=0)))
    assert activations.tokens_per_item == 12 and activations.provenance.first_position == 0


@pytest.mark.parametrize("batches", [0, 1, 3, 6])
def test_an_interrupted_run_goes_on(config, small_shards, monkeypatch, batches):
    """Interrupted before any batch, within shards, before the last batch: in the end the same bytes."""
    interrupt_after(monkeypatch, batches)
    with pytest.raises(KeyboardInterrupt):
        extract(config)
    with pytest.raises(InputError):
        open_activations(config.out)
    left = open_shards(config.out)
    monkeypatch.undo()
    monkeypatch.setattr(extract_module, "_SHARD_BYTES", (20 * 96, 20 * 96))
    extract(config)
    assert all(config.out.joinpath(name).stat().st_mtime_ns == time for name, time in left.items())
    uninterrupted = changed(config, out=config.out.with_name("whole"))
    extract(uninterrupted)
    assert content(config.out) == content(uninterrupted.out)


def interrupt_after(monkeypatch, batches: int) -> None:
    checked, seen = extract_module._checked, []

    def check(rows, config):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(None)
        return checked(rows, config)

    monkeypatch.setattr(extract_module, "_checked", check)


def open_shards(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("shard-*.npy")}


@pytest.mark.slow
def test_a_killed_process_goes_on(config, tmp_path):
    """SIGKILL as soon as there is a shard, in a process of its own."""
    large = changed(config, tokens=60 * 12, batch_size=1)
    script = tmp_path / "run.py"
    flags = {name: getattr(large, name) for name in large.__dataclass_fields__ if name != "out"}
    script.write_text(
        "import time\nfrom pathlib import Path\nfrom train import extract as e\n"
        "e._SHARD_BYTES = (20 * 96, 20 * 96)\nchecked = e._checked\n"
        "e._checked = lambda rows, config: (time.sleep(0.05), checked(rows, config))[1]\n"
        f"e.extract(e.ExtractConfig(out=Path({str(large.out)!r}), **{flags!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(large.out.glob("shard-*.npy"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (large.out / "activations.json").exists()
    assert subprocess.run([sys.executable, str(script)], env=environment).returncode == 0
    activations = open_activations(large.out)
    activations.verify()
    assert activations.rows == 60 * 11


def test_a_complete_set_is_left_alone(config, capsys):
    before = content(extract(config))
    capsys.readouterr()
    assert extract(changed(config, batch_size=2)) == config.out
    assert capsys.readouterr().out == f"{config.out} is already complete with these settings\n"
    assert content(config.out) == before


def test_other_settings_are_refused(config):
    extract(config)
    with pytest.raises(InputError, match=r"of other settings \(layer: 2 -> 1; seed: 0 -> 4\); use another --out"):
        extract(changed(config, layer=1, seed=4))


def test_other_settings_of_an_unfinished_set_are_refused(config, monkeypatch):
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        extract(config)
    with pytest.raises(InputError, match=r"of other settings \(holdout: 0\.2 -> 0\.3\)"):
        extract(changed(config, holdout=0.3))


def test_a_set_made_elsewhere_is_refused(config):
    extract(config)
    description = json.loads((config.out / "activations.json").read_text())
    description["source"] = {"model": "another"}
    (config.out / "activations.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="of other settings"):
        extract(config)


def test_a_folder_in_use_is_left_alone(config):
    config.out.mkdir()
    (config.out / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds other files \(thesis\.tex\); give --out an empty or a new folder"):
        extract(config)
    assert [file.name for file in config.out.iterdir()] == ["thesis.tex"]


def test_numbers_that_do_not_fit(config, tmp_path):
    model = write_model(tmp_path / "huge", scale=1e7)
    with pytest.raises(InputError, match=r"after block 2 does not fit into float16; use --dtype bfloat16"):
        extract(changed(config, model=str(model), dtype="float16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 4}, "layer 4 is out of range; .* has 3 blocks"),
        ({"sequence_length": 65}, "--sequence-length is 65, .* takes at most 64; lower it"),
        ({"inputs": ("/none",)}, "--inputs /none does not exist"),
        ({"model": "/none"}, "--model /none is neither a path nor one of smollm2-135m"),
        ({"sequence_length": 41}, "shorter than one window"),
    ],
)
def test_bad_input_leaves_nothing_behind(config, changes, message):
    with pytest.raises(InputError, match=message):
        extract(changed(config, **changes))
    assert list(config.out.iterdir()) == []


def test_a_tokenizer_of_another_model(config, tmp_path):
    model = write_model(tmp_path / "other", words=[*WORDS, "one more"])
    with pytest.raises(InputError, match="has 62 tokens, its embedding 61"):
        extract(changed(config, model=str(model)))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("layer", -1),
        ("tokens", 11),
        ("sequence_length", 1),
        ("batch_size", 0),
        ("holdout", 1.0),
        ("holdout", -0.1),
        ("seed", -1),
        ("skip_first", 12),
        ("skip_first", -1),
    ],
)
def test_flags_out_of_range(config, flag, value):
    with pytest.raises(InputError, match=rf"^--{flag.replace('_', '-')} is {value}; expected "):
        extract(changed(config, **{flag: value}))


def test_command_line(config, capsys):
    flags = f"--model {config.model} --layer 3 --sequence-length 100 --out {config.out}"
    with pytest.raises(SystemExit) as exit:
        cli.run(extract, flags.split(), prog="python -m train.extract")
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: --sequence-length is 100, ")


def test_where_it_goes_by_default():
    assert ExtractConfig().folder == Path("runs/activations/smollm2-135m-layer9")
    assert ExtractConfig(model="/models/tiny.gguf", layer=3).folder == Path("runs/activations/tiny-layer3")
