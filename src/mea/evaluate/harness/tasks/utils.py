"""What the task files of this folder need of a row."""

from typing import Any

from lm_eval.tasks.aime.utils import is_equiv, last_boxed_only_string, remove_boxed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Row = dict[str, Any]


def options_as_list(row: Row) -> str:
    """Question and options, which are a list."""
    return _asked(row["question"], row["options"])


def options_by_letter(row: Row) -> str:
    """Question and options, which are named by letters."""
    return _asked(row["question"], _existing(row["options"]).values())


def letters(row: Row) -> list[str]:
    """The letters of the options."""
    return list(LETTERS[: len(_existing(row["options"]))])


def index_of_answer_letter(row: Row) -> int:
    """Number of the right option."""
    return LETTERS.index(row["answer_letter"].strip())


def index_of_label(row: Row) -> int:
    """Number of the right option."""
    return list(_existing(row["options"])).index(row["label"].strip())


def problem(row: Row) -> str:
    """A problem, with what the answer is to look like."""
    return _boxed(row["problem"])


def question(row: Row) -> str:
    """A question, with what the answer is to look like."""
    return _boxed(row["question"])


def final_answer(row: Row) -> str:
    """All answers in one, without dollars."""
    return ", ".join(answer.strip().strip("$") for answer in row["final_answer"])


def process_results(row: Row, results: list[str]) -> dict[str, int]:
    """1 if the last box holds the answer; several answers may stand in any order."""
    boxed = last_boxed_only_string(results[0])
    if boxed is None:
        return {"exact_match": 0}
    answer, several = remove_boxed(boxed), bool(row.get("is_multiple_answer"))
    target = final_answer(row) if "final_answer" in row else str(row["answer"]).strip().strip("$")
    if not several:
        return {"exact_match": int(is_equiv(answer, target))}
    parts, wanted = answer.split(","), target.split(",")
    matches = [any(is_equiv(part.strip(), one.strip()) for part in parts) for one in wanted]
    return {"exact_match": int(len(parts) == len(wanted) and all(matches))}


def _asked(text: str, options: Any) -> str:
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([f"Question: {text.strip()}", *listed, "Answer:"])


def _existing(options: Any) -> Any:
    """The options of this row: a data set with a column for each letter fills those that a row lacks with None."""
    if isinstance(options, dict):
        return {letter: text for letter, text in sorted(options.items()) if text is not None}
    return options


def _boxed(text: str) -> str:
    return f"Question: {text.strip()}\nGive the final answer in \\boxed{{}}.\nAnswer:"
