"""The paper's own figures, set beside ours in the report (arXiv 2307.09288v2).

Values printed in a table or the text are exact; those marked "read off" were measured on a chart
and are approximate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PRETRAINING: dict[str, tuple[int, int, float]] = {
    "7B": (184_320, 400, 31.22),
    "13B": (368_640, 400, 62.44),
    "34B": (1_038_336, 350, 153.90),
    "70B": (1_720_320, 400, 291.42),
}
"""Table 2: GPU-hours, watts, tonnes CO2eq"""

PRETRAINING_TOTAL = (3_311_616, 539.00)
"""Table 2, its last row: GPU-hours, tonnes CO2eq (the rows as printed sum to 538.98)"""

VOCABULARY = 32_000
"""§2.2: pieces of the tokenizer"""

ANNOTATIONS = 27_540
"""§3.1: dialogs of supervised fine-tuning"""

REWARD_ACCURACY: dict[str, dict[str, tuple[float, float, float, float, float]]] = {
    "safe": {
        "safe": (0.943, 0.763, 0.657, 0.553, 0.645),
        "helpful": (0.646, 0.575, 0.538, 0.522, 0.562),
    },
    "helpful": {
        "safe": (0.899, 0.732, 0.638, 0.545, 0.628),
        "helpful": (0.807, 0.675, 0.609, 0.547, 0.632),
    },
}
"""Table 8, [reward model][test set]: significantly better, better, slightly, negligibly, all"""

REWARD_ACCURACY_PUBLIC: dict[str, dict[str, float]] = {
    "Anthropic Helpful": {"safe": 0.554, "helpful": 0.720},
    "Anthropic Harmless": {"safe": 0.747, "helpful": 0.710},
    "OpenAI Summarize": {"safe": 0.717, "helpful": 0.755},
    "Stanford SHP": {"safe": 0.652, "helpful": 0.800},
}
"""Table 7, [public test set][reward model]"""

PUBLIC_SETS: dict[str, re.Pattern[str]] = {
    "Anthropic Harmless": re.compile(r"\b(hh|anthropic)\b.*harmless|\bharmless-base\b", re.I),
    "Anthropic Helpful": re.compile(
        r"\b(hh|anthropic)\b.*(helpful|online|sampl)|\bhelpful-(base|online|rejection)", re.I
    ),
    "OpenAI Summarize": re.compile(r"summari[sz]e|summarisation|summarization|tl;?dr", re.I),
    "Stanford SHP": re.compile(r"\bshp\b", re.I),
}
"""public set -> how people name it; an underscore is to be read as a space"""

DEGREES: dict[str, tuple[float, float]] = {
    "significantly": (0.18, 0.09),
    "better": (0.28, 0.21),
    "slightly": (0.28, 0.33),
    "negligibly": (0.25, 0.385),
}
"""Figure 25, read off: share of each degree in the first and the last of 14 batches"""

SAFETY_BINS: dict[str, float] = {"preferred_only": 0.18, "both": 0.47, "neither": 0.35}
"""§3.2.1: share of each safety label"""

BEST_OF_20 = (0.54, 0.67)
"""Figure 7, read off: mean reward of the median sample, and of the best of about 20"""

BEST_TEMPERATURE = (1.2, 1.3)
"""§3.2.3, Figure 8: best temperature of the RLHF model for 10 to 100 samples"""

GHOST_TURNS: dict[int, tuple[float, float]] = {
    2: (1.0, 1.0),
    4: (0.1, 1.0),
    6: (0.0, 1.0),
    20: (0.0, 1.0),
}
"""Table 30: share of answers that still obey the instruction, without and with Ghost Attention"""


@dataclass(frozen=True)
class Progress:
    """One point of Figure 11: win rate against ChatGPT by the authors' reward models, read off."""

    version: str
    helpful: float
    safe: float


WIN_RATES: tuple[Progress, ...] = (
    Progress("SFT-v1", 0.39, 0.22),
    Progress("SFT-v2", 0.54, 0.48),
    Progress("RLHF-v1", 0.61, 0.48),
    Progress("RLHF-v2", 0.63, 0.45),
    Progress("RLHF-v3", 0.65, 0.54),
    Progress("RLHF-v4", 0.67, 0.59),
    Progress("RLHF-v5 (no PPO)", 0.70, 0.67),
    Progress("RLHF-v5 (with PPO)", 0.78, 0.76),
)

VIOLATIONS: dict[str, float] = {"7B": 0.03, "13B": 0.03, "34B": 0.07, "70B": 0.04}
"""Figure 17, read off: share of about 2,000 adversarial prompts answered with a violation"""

VIOLATIONS_CHATGPT = 0.07
"""the same figure, ChatGPT"""

FALSE_REFUSALS = (0.15, 0.27)
"""§4.2.3: borderline prompts refused, without and with all the safety data"""

PRETRAINING_LOSS: dict[str, float] = {"7B": 1.74, "13B": 1.67, "34B": 1.57, "70B": 1.50}
"""Figure 5, read off: final training loss, nats a token"""

DISTILLATION = (0.75, 0.82, 0.87)
"""Figure 16, read off: median safety reward of the base answers, after a generic preprompt, with an
answer template"""
