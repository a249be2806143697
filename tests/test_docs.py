"""Tables in the docs are what a command printed."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def evaluation():
    spec = importlib.util.spec_from_file_location("evaluation", ROOT / "benchmarks" / "evaluation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["evaluation.md", "model-card.md"])
def test_evaluation_in_the_docs_is_that_of_the_file(evaluation, page):
    content = json.loads((ROOT / "docs" / "evaluation.json").read_text())
    text = (ROOT / "docs" / page).read_text()
    assert evaluation.filled(text, content) == text
    lines = set(text.splitlines())
    shown = [len(lines & set(rows(content).values())) for rows in (evaluation.rows_of, evaluation.finding_rows)]
    assert shown[0] >= 10 and shown[1] == (18 if page == "model-card.md" else 0)
    content["factual"]["auc_macro_generated"]["value"] = 0.123
    assert evaluation.filled(text, content) != text


def test_the_evaluation_is_of_the_weights_in_the_package():
    from t2ct.pipeline import T2CTPipeline

    content = json.loads((ROOT / "docs" / "evaluation.json").read_text())
    pipe = T2CTPipeline.from_pretrained(device="cpu")
    assert content["facts"]["systems"]["made"]["weights"] == pipe.weights_hash
    listens = (ROOT / "docs" / "listens.md").read_text()
    assert f"weights {pipe.weights_hash[:16]}" in listens
