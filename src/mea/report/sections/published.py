"""Rows that the paper published (arXiv 2601.19611), in percent: its tables 1 and 2."""

PAPER = "arXiv 2601.19611"

# Table 1: column -> task of the harness, and its rows in that order (accuracy, no examples), the average last.
TABLE_1 = {
    "PIQA": "piqa",
    "OBQA": "openbookqa",
    "WinoGrande": "winogrande",
    "HellaSwag": "hellaswag",
    "ARC-e": "arc_easy",
    "ARC-c": "arc_challenge",
}
PUBLISHED_1 = {
    "Transformer": (71.93, 21.00, 56.04, 40.62, 59.51, 26.19, 45.88),
    "+ GroupNorm": (71.38, 21.00, 56.12, 40.59, 59.13, 25.77, 45.67),
    "+ DFA": (71.76, 22.20, 54.38, 41.29, 60.69, 27.82, 46.36),
    "MEA": (73.18, 19.80, 54.14, 42.02, 61.57, 27.65, 46.39),
}
SCALE_1 = "1B, 500B tokens"

# Table 2: averages over the columns of each group. The differences that the paper prints are to the row "+ CPT".
TABLE_2 = ("knowledge", "science", "math", "total")
PUBLISHED_2 = {
    "Qwen3-30B-A3B": (63.82, 48.39, 65.12, 58.68),
    "+ CPT": (65.81, 49.76, 50.48, 54.39),
    "half + CPT": (63.54, 49.44, 48.49, 52.94),
    "deep + CPT": (61.91, 48.27, 46.13, 51.21),
    "full + CPT": (61.25, 42.07, 43.68, 47.89),
    "full + Recover + CPT": (64.41, 48.79, 46.89, 52.36),
}
SCALE_2 = "Qwen3-30B-A3B"
