"""Our own task files on rows with the columns of the published data sets; the hub itself is not asked."""

from pathlib import Path

import pytest
from lm_eval import evaluator

from mea.evaluate.harness.local_data import TaskData
from mea.evaluate.harness.model import PackedLM, harness_task, task_manager

OPTIONS = ["oxygen", "nitrogen", "argon"]
ROWS = {
    "mea_supergpqa": {"question": "Most of air?", "options": OPTIONS, "answer": "nitrogen", "answer_letter": "B"},
    "mea_medxpertqa": {
        "question": "Most of air?",
        "options": dict(zip("ABC", OPTIONS, strict=True)) | {"D": None},
        "label": "B",
    },
    "mea_olymmath_en_easy": {"problem": "What is 1/2?", "answer": r"\frac{1}{2}", "subject": "Algebra"},
    "mea_olymmath_en_hard": {"problem": "What is 1/2?", "answer": r"$\frac{1}{2}$", "subject": "Algebra"},
    "mea_olympiadbench": {"question": "Roots of x²=4?", "final_answer": ["$2$", "$-2$"], "is_multiple_answer": True},
}


def task(name):
    return harness_task(name, TaskData(name, "test", (ROWS[name],), "digest"))


@pytest.mark.parametrize("name", ["mea_supergpqa", "mea_medxpertqa"])
def test_a_letter_is_chosen(tiny, bytes_tokenizer, name):
    model = tiny("Llama", vocab_size=258)
    found = evaluator.evaluate(PackedLM(model, bytes_tokenizer, batch_tokens=512), {"tasks": task(name)})
    (sample,) = found["samples"][name]
    asked = [one[0] for one in sample["arguments"]]
    assert asked == ["Question: Most of air?\nA. oxygen\nB. nitrogen\nC. argon\nAnswer:"] * 3
    assert [one[1] for one in sample["arguments"]] == [" A", " B", " C"]
    assert sample["target"] == 1
    assert "acc,none" in found["results"][name]


@pytest.mark.parametrize(
    ("name", "answer", "score"),
    [
        ("mea_olymmath_en_easy", r"So \boxed{\frac{1}{2}}.", 1),
        ("mea_olymmath_en_easy", r"So \boxed{\frac12}, I think.", 1),
        ("mea_olymmath_en_hard", r"So \boxed{\frac{1}{2}}.", 1),
        ("mea_olymmath_en_hard", r"\boxed{1} or \boxed{2}", 0),
        ("mea_olymmath_en_hard", r"\frac{1}{2}", 0),
        ("mea_olympiadbench", r"\boxed{-2, 2}", 1),
        ("mea_olympiadbench", r"\boxed{2}", 0),
        ("mea_olympiadbench", r"\boxed{2, -2, 0}", 0),
    ],
)
def test_a_boxed_answer_is_compared(name, answer, score):
    (one,) = task(name).values()
    assert one.doc_to_text(ROWS[name]).startswith(("Question: What is", "Question: Roots"))
    assert r"\boxed{}" in one.doc_to_text(ROWS[name])
    assert one.process_results(ROWS[name], [answer]) == {"exact_match": score}


def test_what_the_hub_would_be_asked_for():
    asked = {}
    for name in ROWS:
        text = Path(task_manager().task_index[name].yaml_path).read_text(encoding="utf-8")
        fields = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith("dataset_"))
        asked[name] = fields["dataset_path"], fields.get("dataset_name")
    assert asked == {
        "mea_supergpqa": ("m-a-p/SuperGPQA", None),
        "mea_medxpertqa": ("TsinghuaC3I/MedXpertQA", "Text"),
        "mea_olymmath_en_easy": ("RUC-AIBOX/OlymMATH", "en-easy"),
        "mea_olymmath_en_hard": ("RUC-AIBOX/OlymMATH", "en-hard"),
        "mea_olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP"),
    }
