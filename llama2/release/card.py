"""README.md: the model card, in the form that the Hugging Face Hub reads.

A program knows what was done and measured. What only a person can know (contact, purpose, the
licence of the weights) is asked for in `Card`, and named as missing where nobody said it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llama2.config import Config
from llama2.errors import UserError, explain_os_errors
from llama2.formats.hf_config import read_config
from llama2.model.llama import LlamaConfig
from llama2.release import carbon_statement, card_making, card_results
from llama2.release import markdown as md
from llama2.release.licences import LLAMA_2_NOTE, Material, from_llama_2
from llama2.release.lineage import Lineage
from llama2.release.measurements import Measured
from llama2.report.energy import Power, format_amounts

FILE = "README.md"


class Card(Config):
    """What only a person can say about a model."""

    title: str = ""
    """name of the model; empty: that of the recipe and the run"""
    license: str = ""
    """licence of the weights, as the Hub spells it (apache-2.0, llama2, ...)"""
    language: tuple[str, ...] = ()
    """languages of the model (en, de, ...)"""
    base_model: str = ""
    """the Hub's name of the model that this one was derived from"""
    datasets: tuple[str, ...] = ()
    """the Hub's names of the data"""
    tags: tuple[str, ...] = ()
    """further tags"""
    intended_use: str = ""
    """what it is for"""
    out_of_scope: str = ""
    """what it is not for"""
    contact: str = ""
    """whom to write to about it"""
    notes: Path | None = None
    """a Markdown file of your own words, which the card holds as it is"""


@dataclass(frozen=True)
class Model:
    """All that a card tells about."""

    lineage: Lineage
    measured: Measured | None
    materials: Sequence[Material]
    card: Card
    power: Power
    dtype: str
    converted: bool = False
    """whether the weights have another type than the run's"""
    gguf: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """GGUF copies: file -> what differs in it"""

    @property
    def title(self) -> str:
        """The name of the model."""
        return self.card.title or " ".join(
            filter(None, (self.lineage.name, self.lineage.released.name))
        )

    @property
    def shape(self) -> LlamaConfig:
        return read_config(self.lineage.released.step.path)[0]

    @property
    def scorer(self) -> bool:
        """Whether it is a reward model."""
        return read_config(self.lineage.released.step.path)[1]

    @property
    def chats(self) -> bool:
        """Whether it was tuned to answer in conversations."""
        return not self.scorer and bool(self.lineage.of("sft", "ppo"))

    @property
    def task(self) -> str:
        """What the Hub calls its task."""
        return "text-classification" if self.scorer else "text-generation"

    @property
    def languages(self) -> tuple[str, ...]:
        return self.card.language or (("en",) if self.lineage.synthetic else ())


def document(model: Model) -> str:
    """README.md."""
    card = model.card
    derived = from_llama_2(model.lineage, card.base_model)
    return front_matter(model) + md.document(
        f"# {md.text(model.title)}",
        _summary(model),
        LLAMA_2_NOTE if derived else "",
        _facts(model),
        "## Intended use",
        card.intended_use or _intended(model),
        "## Out of scope",
        card.out_of_scope or _out_of_scope(model),
        _use(model),
        card_making.data(model.lineage, model.materials),
        card_making.recipe(model.lineage),
        _carbon(model),
        *(
            []
            if model.scorer
            else [
                card_results.evaluation(model.lineage, model.measured),
                card_results.safety(model.measured),
            ]
        ),
        _scorer_results(model) if model.scorer else "",
        _limits(model),
        _notes(card),
        "## Contact",
        md.text(card.contact) if card.contact else "Nobody is named to whom one could write.",
        "## Files",
        _files(model),
    )


def front_matter(model: Model) -> str:
    """The YAML block that the Hub reads."""
    card = model.card
    derived = from_llama_2(model.lineage, card.base_model)
    tags = {
        "conversational": model.chats,
        "reward-model": model.scorer,
        "gguf": bool(model.gguf),
        "synthetic": model.lineage.synthetic,
    }
    found: dict[str, Any] = {
        "license": card.license or ("llama2" if derived else "unknown"),
        "library_name": "transformers",
        "pipeline_tag": model.task,
        "tags": sorted({"llama", *card.tags, *(tag for tag, fits in tags.items() if fits)}),
    }

    for name, value in (
        ("language", list(model.languages)),
        ("base_model", card.base_model),
        ("datasets", list(card.datasets)),
    ):
        if value:
            found[name] = value

    results = [] if model.scorer else card_results.index(model.measured, model.task)
    if results:
        found["model-index"] = [{"name": model.title, "results": results}]

    return f"---\n{yaml.safe_dump(found, sort_keys=True, allow_unicode=True, width=120)}---\n\n"


def _summary(model: Model) -> str:
    kind = (
        "A reward model" if model.scorer else "A chat model" if model.chats else "A language model"
    )
    story = card_making.story(model.lineage)
    return (
        f"{kind} of the Llama 2 architecture with {md.count(model.shape.parameters())} parameters"
        + (f": {story}" if story else "")
        + "."
    )


def _facts(model: Model) -> str:
    shape, stages = model.shape, model.lineage.stages
    days = sorted({str(stage.step.manifest.get("started", ""))[:10] for stage in stages} - {""})
    rows = [
        ("Layers", str(shape.num_hidden_layers)),
        ("Width", f"{shape.hidden_size}, {shape.intermediate_size} in the feed-forward network"),
        ("Heads", f"{shape.num_attention_heads}, {shape.num_key_value_heads} of keys and values"),
        ("Vocabulary", md.count(shape.vocab_size)),
        ("Context", f"{md.count(shape.max_position_embeddings)} tokens"),
        ("Weights", model.dtype + (", converted from the run's" if model.converted else "")),
        ("Languages", ", ".join(map(md.text, model.languages)) or "not stated"),
        ("Licence of the weights", md.text(model.card.license) or "not stated"),
        ("Made", " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "not recorded"),
    ]

    return md.table(("Property", "Value"), rows, (0, 1))


def _intended(model: Model) -> str:
    if model.lineage.synthetic:
        return (
            "Study and teaching: it shows what each stage of the Llama 2 recipe does, at a size that fits a "
            "laptop. It can speak about its synthetic world and nothing else."
        )

    return (
        "Research and further training. Whoever released it has not stated a purpose; the results below say what "
        "it was found to do."
    )


def _out_of_scope(model: Model) -> str:
    return md.bullets(
        "Anything in which a wrong, harmful or missing answer has consequences.",
        "Advice on health, law or money, and decisions about people.",
        "Use by the public without the checks that `RESPONSIBLE_USE.md` asks for.",
        "Questions about the real world."
        if model.lineage.synthetic
        else "Languages other than those it was measured in.",
    )


# ---- how to use it
# --------------------------------------------------------------------------------------------------
_CHAT = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
conversation = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, do_sample=True, temperature={temperature}, top_p={top_p}, max_new_tokens={tokens})
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={tokens})[0], skip_special_tokens=True))"""
_SCORE = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)
conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How can I help?"}]
inputs = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
print(torch.sigmoid(model(**inputs).logits))  # a probability; the logit is the reward"""


def _use(model: Model) -> str:
    sampling: Mapping[str, Any] = (
        model.measured.content.get("sampling") or {} if model.measured else {}
    )
    values = {
        "temperature": sampling.get("temperature", 0.6),
        "top_p": sampling.get("top_p", 0.9),
        "tokens": sampling.get("max_tokens", 256),
    }
    python = _SCORE if model.scorer else (_CHAT if model.chats else _TEXT).format(**values)
    commands = (
        ["llama2 serve .    # POST /v1/score"]
        if model.scorer
        else ["llama2 chat .", "llama2 serve .    # OpenAI's interface and a page to chat"]
        if model.chats
        else []
    )

    return md.document(
        "## How to use it",
        "With transformers (`pip install transformers sentencepiece protobuf`):",
        f"```python\n{python}\n```",
        "With the program that made it:" if commands else "",
        _shell(*commands),
        _llama_cpp(model, values),
        _format(model),
        "The settings above are those it was measured with." if sampling and model.chats else "",
    )


def _shell(*lines: str) -> str:
    return "```sh\n" + "\n".join(lines) + "\n```" if lines else ""


def _llama_cpp(model: Model, values: Mapping[str, Any]) -> str:
    if not model.gguf:
        return ""

    name = next(iter(model.gguf))
    quantized = [name for name in sorted(model.gguf) if name.endswith(("q8_0.gguf", "q4_0.gguf"))]
    how = "-cnv" if model.chats else '-p "Once upon a time" -no-cnv'
    notes = [
        f"{md.code(file)}: {md.text(note)}."
        for file, listed in sorted(model.gguf.items())
        for note in listed
    ]
    listed = ", ".join(map(md.code, quantized))

    return md.document(
        "With llama.cpp:",
        _shell(
            f"llama-cli -m {name} {how} --temp {values['temperature']} --top-p {values['top_p']}"
        ),
        f"The GGUF files are copies{f'; quantized: {listed}' if quantized else ''}. The results below are those of the "
        "run's weights, not of a copy.",
        md.bullets(*notes),
    )


def _format(model: Model) -> str:
    if not model.chats and not model.scorer:
        return "It was not tuned for conversations: it goes on with a text."

    return md.document(
        "### The format of a conversation",
        "`<s>` and `</s>` are the tokens that begin and end a turn; all else is text. There may be no system message.",
        "```\n<s>[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nUSER [/INST] ANSWER </s><s>[INST] USER [/INST]\n```",
        "`tokenizer_config.json` has it as a chat template.",
    )


# ---- the rest
# ---------------------------------------------------------------------------------------------------
def _carbon(model: Model) -> str:
    hours, kwh, kg = carbon_statement.total(model.lineage, model.power)
    return md.document(
        "## Energy and carbon",
        f"{carbon_statement.duration(hours)} of device time over all stages above, "
        f"about {' and '.join(format_amounts(kwh, kg))} CO2eq by the method of the Llama 2 paper. `CARBON.md` "
        "has the assumptions and every stage.",
    )


def _scorer_results(model: Model) -> str:
    own = [
        stage for stage in model.lineage.of("reward") if stage.name == model.lineage.released.name
    ]
    return (
        card_results.evaluation(model.lineage, None).replace(f"{card_results.NOTHING}\n\n", "")
        if own
        else ""
    )


def _limits(model: Model) -> str:
    found = model.measured
    weakest = card_results.weakest(found) if found is not None else None
    outside = [one.place for _, one in model.lineage.bases]

    return md.document(
        "## Limits",
        md.bullets(
            "It knows nothing beyond its synthetic world, and does not know that."
            if model.lineage.synthetic
            else "It may state what is false, and repeat what is wrong or biased in its data.",
            f"It was measured worst on {md.code(weakest[0])} prompts ({weakest[1]:.2f} of 1)."
            if weakest
            else "",
            "The weights were converted after they were measured."
            if model.converted and found is not None
            else "",
            f"It reads at most {md.count(model.shape.max_position_embeddings)} tokens of conversation and answer.",
            "Truthfulness, bias, toxicity, memorised data, attacks over several turns, and languages were not measured.",
            f"Nothing is known here about how {', '.join(map(md.code, outside))} came about."
            if outside
            else "",
            "Every stage was carried out once, with one seed.",
        ),
    )


def _notes(card: Card) -> str:
    if card.notes is None:
        return ""

    with explain_os_errors(card.notes):
        text = card.notes.read_bytes()

    try:
        return md.document("## Notes by whoever released it", text.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{card.notes}: not UTF-8", "save it as UTF-8") from None


def _files(model: Model) -> str:
    return md.bullets(
        "`RESPONSIBLE_USE.md`: where it fails, and what to do before others use it",
        "`CARBON.md`, `carbon.json`",
        "`LICENSES.md`",
        "`COMMANDS.md`, `reproduce.sh`, `configs/`, `lineage.json`: how it was made",
        *(md.code(name) for name in sorted(model.gguf)),
        "`SHA256SUMS`: check with `sha256sum -c SHA256SUMS`",
    )
