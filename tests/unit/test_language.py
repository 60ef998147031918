"""The language of an answer by common words and script; sentences of our own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llama2.evaluate.language import LANGUAGES, find_language

SENTENCES = {
    "English": "The bread is baked in an oven that has been heated for half an hour.",
    "French": "Le pain est cuit dans un four qui a été chauffé pendant une demi-heure.",
    "Spanish": "El pan se hornea en un horno que se ha calentado durante media hora.",
    "German": "Das Brot wird in einem Ofen gebacken, der eine halbe Stunde lang geheizt wurde.",
    "Italian": "Il pane si cuoce in un forno che è stato scaldato per mezz'ora, con la porta chiusa.",
    "Portuguese": "O pão é assado em um forno que foi aquecido durante meia hora, com a porta fechada.",
    "Dutch": "Het brood wordt gebakken in een oven die een half uur lang is verwarmd.",
    "Russian": "Хлеб пекут в печи, которую нагревали полчаса.",
    "Greek": "Το ψωμί ψήνεται σε φούρνο που έχει ζεσταθεί για μισή ώρα.",
    "Arabic": "يُخبز الخبز في فرن تم تسخينه لمدة نصف ساعة.",
    "Chinese": "面包在预热半小时的烤箱里烘烤。",
    "Japanese": "パンは三十分温めたオーブンで焼きます。",
    "Korean": "빵은 반 시간 동안 데운 오븐에서 굽습니다.",
    "Hindi": "रोटी आधे घंटे तक गरम किए गए तंदूर में पकाई जाती है।",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_sentence_is_of_its_language(name: str) -> None:
    assert find_language(SENTENCES[name]) == name
    assert name in LANGUAGES


@pytest.mark.parametrize("text", ["", "42 + 17", "Xyzzy plugh frotz.", "!?", "Paris Napoleon"])
def test_what_tells_nothing_is_of_no_language(text: str) -> None:
    assert find_language(text) == ""


def test_half_of_two_languages_is_of_neither() -> None:
    assert find_language(f"{SENTENCES['English']} {SENTENCES['German']}") == ""
    # a name or a quotation changes nothing
    assert find_language(f"{SENTENCES['German']} (The Times)") == "German"


XQUAD = os.environ.get("LLAMA2_XQUAD")


@pytest.mark.skipif(not XQUAD, reason="LLAMA2_XQUAD names no folder with xquad.XX.json files")
@pytest.mark.parametrize(
    ("code", "name"),
    [("de", "German"), ("es", "Spanish"), ("ru", "Russian"), ("zh", "Chinese"), ("ar", "Arabic")],
)
def test_paragraphs_of_xquad(code: str, name: str) -> None:
    articles = json.loads((Path(XQUAD or "") / f"xquad.{code}.json").read_text())["data"]
    texts = [part["context"] for article in articles for part in article["paragraphs"]]
    right = sum(find_language(text) == name for text in texts)
    assert right >= 0.98 * len(texts)
