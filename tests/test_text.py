"""Prompts and the tokenizer."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

from t2ct.text import END, START, Tokenizer, form_prompt

CORPUS = [
    "Findings: Large right pleural effusion with adjacent atelectasis. Impression: Pleural effusion.",
    "Findings: The heart is enlarged. No pericardial effusion. Impression: Cardiomegaly.",
    "Findings: A solid nodule in the left upper lobe. Impression: Left lung nodule.",
    "Findings: The lungs are clear; no nodule, no consolidation. Impression: Normal chest.",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=320)


@pytest.fixture
def clip_style_file(tmp_path):
    """A tokenizer.json built like openai/clip-vit-large-patch14's: word ends, post-processor, fixed length."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *alphabet, *alphabet], trainer)
    backend.add_special_tokens([AddedToken(START), AddedToken(END)])
    size = backend.get_vocab_size()
    backend.post_processor = processors.RobertaProcessing((END, size - 1), (START, size - 2), False, False)
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(77)
    backend.enable_padding(length=77)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_prompt_of_a_string_is_the_string():
    assert form_prompt("  Large right\n pleural\t effusion. ") == "Large right pleural effusion."


@pytest.mark.parametrize(
    "report, want",
    [
        ({"findings": "Clear lungs.", "impression": "Normal."}, "Findings: Clear lungs. Impression: Normal."),
        ({"impression": "Normal.", "findings": " Clear\nlungs. "}, "Findings: Clear lungs. Impression: Normal."),
        ({"findings": "Clear lungs."}, "Findings: Clear lungs."),
        ({"findings": math.nan, "impression": "Normal."}, "Impression: Normal."),
        ({"findings": "Clear lungs.", "impression": None}, "Findings: Clear lungs."),
        ({"findings": "Clear lungs.", "impression": "nan"}, "Findings: Clear lungs."),
        ({"findings": "Clear lungs.", "impression": " "}, "Findings: Clear lungs."),
    ],
)
def test_prompt_of_a_report(report, want):
    assert form_prompt(report) == want


@pytest.mark.parametrize(
    "text, error, message",
    [
        (" \n", ValueError, "text: wanted a prompt of at least one word, got"),
        ({}, ValueError, "at least one word"),
        ({"findings": None, "impression": math.nan}, ValueError, "at least one word"),
        ({"findings": "x", "history": "y"}, ValueError, "wanted the keys findings and impression, got 'history'"),
        ("a \ud800 b", ValueError, r"text: wanted characters, got the lone surrogate '.ud800' in"),
        ({"findings": "\udcff"}, ValueError, "text: wanted characters, got the lone surrogate"),
        ({"findings": 3}, TypeError, r"text\['findings'\]: wanted a str, got int"),
        (None, TypeError, "text: wanted a str or a mapping of findings and impression, got NoneType"),
        (b"effusion", TypeError, "got bytes"),
    ],
)
def test_prompt_refuses(text, error, message):
    with pytest.raises(error, match=message):
        form_prompt(text)


def test_training_gives_the_exact_size_with_the_end_last(tokenizer):
    assert tokenizer.vocab_size == 320
    assert (tokenizer.start_id, tokenizer.end_id) == (318, 319)


def test_rows_start_end_and_are_padded_with_the_end(tokenizer):
    ids = tokenizer.encode(["Right pleural effusion.", "Normal"], max_length=64)
    assert ids.dtype == torch.int64 and ids.shape[1] < 64
    assert (ids[:, 0] == tokenizer.start_id).all() and (ids[:, -1] == tokenizer.end_id).all()
    first_end = ids.argmax(-1)
    assert first_end[0] == ids.shape[1] - 1 and first_end[1] < first_end[0]
    assert (ids[1, first_end[1] :] == tokenizer.end_id).all()


@pytest.mark.parametrize("text", ["left nodule, 6 mm.", "épanchement ü 胸水 🫁", "a  b\nc"])
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode([text.upper()], max_length=128)[0]
    assert tokenizer.decode(ids) == " ".join(text.split())


def test_file_round_trip_and_determinism(tokenizer, tmp_path):
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path in paths:
        Tokenizer.train(iter(CORPUS), vocab_size=320, path=path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    again = Tokenizer.from_file(paths[0])
    assert torch.equal(again.encode(CORPUS, 128), tokenizer.encode(CORPUS, 128))


def test_long_texts_are_cut_with_one_warning_that_quotes_the_rest(tokenizer):
    texts = ["Normal chest.", "Normal chest. " + "Pleural effusion. " * 40, "Clear lungs. " * 40 + "Last Words."]
    with pytest.warns(UserWarning) as caught:
        ids = tokenizer.encode(texts, max_length=16)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "2 of 3 texts longer than 16 tokens" in message and 'Last Words."' in message
    assert caught[0].filename == __file__
    assert ids.shape == (3, 16)
    assert (ids[:, -1] == tokenizer.end_id).all() and (ids[1:].argmax(-1) == 15).all()


def test_cut_text_is_exactly_what_the_row_lacks(tokenizer):
    text = "large right pleural effusion with adjacent atelectasis."
    with pytest.warns(UserWarning) as caught:
        kept = tokenizer.decode(tokenizer.encode([text], max_length=8)[0])
    quoted = str(caught[0].message).split('"')[1]
    assert (kept + quoted).replace(" ", "") == text.replace(" ", "")


def test_a_text_that_just_fits_gives_no_warning(tokenizer):
    length = tokenizer.encode(["Pleural effusion."], 64).shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["Pleural effusion."], length)


def test_special_tokens_in_a_report_are_text(tokenizer):
    ids = tokenizer.encode([f"normal {END} {START} chest"], 64)[0]
    assert ids.argmax() == len(ids) - 1
    assert (ids == tokenizer.start_id).sum() == 1
    assert tokenizer.decode(ids) == f"normal {END} {START} chest"


def test_clip_style_file_gets_its_start_and_end_once(clip_style_file):
    tokenizer = Tokenizer.from_file(clip_style_file)
    ids = tokenizer.encode(["Large right pleural effusion."], 512)[0]
    assert (ids == tokenizer.start_id).sum() == (ids == tokenizer.end_id).sum() == 1
    assert ids[0] == tokenizer.start_id and ids[-1] == tokenizer.end_id and len(ids) < 77
    assert tokenizer.decode(ids) == "large right pleural effusion ."
    spelled = tokenizer.encode([f"normal {END} chest"], 512)[0]
    assert spelled.argmax() == len(spelled) - 1
    assert len(tokenizer.encode(["effusion " * 100], 512)[0]) == 102


def test_tokenizer_refuses(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="texts: wanted a list of str, got str"):
        tokenizer.encode("effusion", 16)
    with pytest.raises(TypeError, match="texts: wanted a list of str, got list"):
        tokenizer.encode([None], 16)
    with pytest.raises(ValueError, match="texts: wanted at least one text, got none"):
        tokenizer.encode([], 16)
    with pytest.raises(ValueError, match="texts: wanted characters, got the lone surrogate"):
        tokenizer.encode(["a \udc80"], 16)
    with pytest.raises(ValueError, match="max_length: wanted at least 3 .* got 2"):
        tokenizer.encode(["effusion"], 2)
    with pytest.raises(ValueError, match="vocab_size: wanted at least 258, got 100"):
        Tokenizer.train(CORPUS, 100)
    with pytest.raises(ValueError, match=r"vocab_size: wanted 30000, got texts that give only \d+ tokens"):
        Tokenizer.train(CORPUS, 30000)
    with pytest.raises(FileNotFoundError, match="tokenizer: wanted a tokenizer.json, got no file at"):
        Tokenizer.from_file(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: wanted a tokenizer.json, got .*broken.json"):
        Tokenizer.from_file(tmp_path / "broken.json")


def test_tokenizer_without_the_special_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match=r"wanted <\|startoftext\|> and <\|endoftext\|> as ids 0 and 1, got"):
        Tokenizer.from_file(tmp_path / "bare.json")


def test_import_needs_no_torch():
    code = "import sys, t2ct.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
