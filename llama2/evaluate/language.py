"""The language of an answer, told by its commonest words or by its script: enough to check "always
answer in French" (§3.3), and needing no model and no download.

Where two languages share words, the one with the larger share of known words wins by a margin; a
text that is too short, or mixed, is of no language.
"""

from __future__ import annotations

import re
from collections import Counter

_COMMON = {
    "English": (
        "the of and to in is that it was for on are as with they be at this have from or had by "
        "but what not were we when your can said there an each which do how their if will other "
        "about out many then them these so some would into has more her his my you i he she"
    ),
    "French": (
        "le la les de des du un une et est que qui dans pour pas sur avec ce cette il elle sont "
        "au aux par plus ne se vous nous je mais ou son sa ses leur été être avoir comme fait "
        "peut ont aussi tout très bien votre notre d l c qu n s j"
    ),
    "Spanish": (
        "el la los las de del un una y es que en por para con no se su sus al lo como más pero "
        "este esta esto son fue ser está muy también hay o si ha sobre entre cuando todo todos "
        "puede puedes tiene nos yo mi usted ellos desde hasta porque"
    ),
    "German": (
        "der die das und ist in zu den von mit sich auf für nicht ein eine einen einem einer des "
        "dem als auch es an werden aus er hat dass sie nach wird bei sind noch wie über so zum "
        "zur oder aber ich wir ihr man kann haben durch wenn nur war im am"
    ),
    "Italian": (
        "il lo la i gli le di del della dei delle un una uno e è che in per con non si da dal nel "
        "nella al alla ai sono come più ma anche questo questa essere ha hanno su sul tra cui o se "
        "mi ti ci molto può suo sua loro io"
    ),
    "Portuguese": (
        "o a os as de do da dos das um uma e é que em no na nos nas por para com não se ao à mais "
        "como mas foi ser são está também ou seu sua seus muito pode você eu ele ela isso este "
        "esta pelo pela quando há entre sobre tem"
    ),
    "Dutch": (
        "de het een en van in is dat op te zijn met voor niet die er aan om ook als maar bij dit "
        "of door naar uit wordt hebben heeft kan ik je we ze hij zij worden deze nog wel geen "
        "over dan was tot meer wat u"
    ),
}
_WORDS = {name: frozenset(words.split()) for name, words in _COMMON.items()}
_MARKS = {
    "French": "çèêœùâîôû",
    "Spanish": "ñ¿¡íó",
    "German": "äöüß",
    "Italian": "ìòà",
    "Portuguese": "ãõçâ",
}
"""letters that hardly any of the others has; one in a word counts like half a common word"""
_SCRIPTS = {
    "Russian": re.compile(r"[\u0400-\u04ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff\u0750-\u077f]"),
    "Chinese": re.compile(r"[\u4e00-\u9fff]"),
    "Japanese": re.compile(r"[\u3040-\u30ff]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Hindi": re.compile(r"[\u0900-\u097f]"),
    "Korean": re.compile(r"[\uac00-\ud7af]"),
}
LANGUAGES = (*_WORDS, *_SCRIPTS)
_WORD = re.compile(r"[^\W\d_]+")
_LEAST = 0.15
"""share of the words that must be a language's commonest"""
_MARGIN = 1.2
"""times as many as of any other language"""


def find_language(text: str) -> str:
    """Return the language of a text, one of `LANGUAGES`; empty where that cannot be told."""
    letters = [character for character in text if character.isalpha()]
    for name, script in _SCRIPTS.items():
        if len(letters) > 1 and len(script.findall(text)) > 0.5 * len(letters):
            # Japanese is written with Chinese characters too
            is_mixed = name == "Chinese" and _SCRIPTS["Japanese"].search(text)
            return "Japanese" if is_mixed else name

    words = _WORD.findall(text.lower())
    scores = Counter({name: _score(words, name) for name in _WORDS})
    (best, most), (_, second) = scores.most_common(2)
    is_clear = most >= max(1.0, _LEAST * len(words)) and most >= _MARGIN * second
    return best if is_clear else ""


def _score(words: list[str], language: str) -> float:
    common, marks = _WORDS[language], _MARKS.get(language, "")
    score = 0.0
    for word in words:
        if word in common:
            score += 1.0
        elif any(mark in word for mark in marks):
            score += 0.5

    return score
