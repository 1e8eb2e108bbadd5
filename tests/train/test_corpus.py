"""Documents to windows: distinct contexts, split by document, found again by their provenance."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jax_sae.errors import InputError
from train.corpus import Document, cut_windows, read_documents

WORDS = [f"w{i}" for i in range(500)]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """One token a word, the id in its name."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture
def documents() -> list[Document]:
    """Document i counts up from 10 i, in 30 to 39 words."""
    texts = [" ".join(WORDS[10 * i : 10 * i + 30 + i % 10]) for i in range(40)]
    return [Document(f"doc{i}", text) for i, text in enumerate(texts)]


def cut(documents, tokenizer, **changes):
    settings = {"n_windows": 30, "sequence_length": 8, "holdout": 0.2, "seed": 0} | changes
    return cut_windows(documents, tokenizer, **settings)


def test_windows_are_where_they_say(documents, tokenizer):
    windows = cut(documents, tokenizer)
    assert windows.tokens.shape == (30, 8) and windows.items.shape == (30, 2)
    assert windows.tokens.dtype == windows.items.dtype == np.int32
    for tokens, (document, offset) in zip(windows.tokens, windows.items, strict=True):
        words = documents[document].text.split()[offset : offset + 8]
        assert [WORDS[i] for i in tokens] == words
    assert windows.documents == [document.name for document in documents]


def test_no_two_windows_overlap(documents, tokenizer):
    windows = cut(documents, tokenizer, n_windows=10_000)
    assert len(windows.tokens) == sum(len(document.text.split()) // 8 for document in documents)
    assert len({tuple(item) for item in windows.items.tolist()}) == len(windows.items)
    assert (windows.items[:, 1] % 8 == 0).all()


def test_held_out_windows_are_of_other_documents(documents, tokenizer):
    windows = cut(documents, tokenizer)
    assert windows.holdout == 6
    held_out, training = windows.items[-6:, 0], windows.items[:-6, 0]
    assert not set(held_out) & set(training)
    assert len(set(training)) > 5  # drawn from many documents, not from one


def test_the_hold_out_is_a_share_of_the_text(documents, tokenizer):
    windows = cut(documents, tokenizer, n_windows=10_000, holdout=0.25)
    assert 0.2 < windows.holdout / len(windows.tokens) < 0.35


def test_the_seed_decides(documents, tokenizer):
    first, again, other = (cut(documents, tokenizer, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()


def test_only_as_many_documents_as_needed_are_encoded(documents, tokenizer):
    class Counting:
        encoded = 0
        encode = tokenizer.encode

        def encode_batch_fast(self, texts, **options):
            self.encoded += len(texts)
            return tokenizer.encode_batch_fast(texts, **options)

    counting = Counting()
    cut(documents, counting, n_windows=1, holdout=0)
    assert counting.encoded == 16  # of 40: they are encoded 16 together, and 3 have the 8 windows to draw from


def test_every_window_opens_with_what_the_tokenizer_wants(documents, tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(single="w499 $A", special_tokens=[("w499", 499)])
    windows = cut(documents, tokenizer)
    assert (windows.tokens[:, 0] == 499).all()
    for tokens, (document, offset) in zip(windows.tokens, windows.items, strict=True):
        words = documents[document].text.split()[offset + 1 : offset + 8]
        assert [WORDS[i] for i in tokens[1:]] == words
    assert windows.items[:, 1].min() == -1


def test_no_hold_out(documents, tokenizer):
    assert cut(documents[:1], tokenizer, n_windows=2, holdout=0).holdout == 0


@pytest.mark.parametrize(
    ("some", "changes", "message"),
    [
        (slice(0, 1), {}, "--inputs is one document, and whole documents are held out; give several"),
        (slice(0, 9), {"sequence_length": 100}, "shorter than one window; lower --sequence-length 100"),
        (slice(0, 9), {"n_windows": 4, "holdout": 0.1}, "--holdout 0.1 of 4 windows is none"),
    ],
)
def test_too_little_text(documents, tokenizer, some, changes, message):
    with pytest.raises(InputError, match=message):
        cut(documents[some], tokenizer, **changes)


def test_inputs_of_every_kind(tmp_path):
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("bé", encoding="utf-8")
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "ignored.md").write_text("c")
    lines = [{"text": "one\u2028line", "id": 7}, {"text": "two"}]
    (tmp_path / "lines.jsonl").write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    documents = read_documents([str(tmp_path / "folder"), str(tmp_path / "lines.jsonl"), str(folder / "b.txt")])
    assert [(document.name, document.text) for document in documents] == [
        ("a", "a"),
        ("deep/b", "bé"),
        ("lines:1", "one\u2028line"),
        ("lines:3", "two"),
        ("b", "bé"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"--inputs .*none\.txt does not exist"),
        ("blank.txt", b" \n", "holds no text"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text .* at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{', r"a\.jsonl line 2 is not JSON"),
        ("b.jsonl", b'{"content": "x"}', r"b\.jsonl line 1 has no text"),
        ("c.jsonl", b"[1]", r"c\.jsonl line 1 has no text"),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents([str(tmp_path / name)])


def test_a_folder_without_text(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.txt or \.jsonl file"):
        read_documents([str(tmp_path)])
