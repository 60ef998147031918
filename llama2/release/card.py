"""README.md: the model card, in the form that the Hugging Face Hub reads.

A program knows what was done and measured. What only a person can know (contact, purpose, the
licence of the weights) is asked for in `Card`, and named as missing where nobody said it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llama2.config import Config
from llama2.errors import UserError, explain_os_errors
from llama2.formats.hf_config import read_config
from llama2.formats.stored_model import list_variations
from llama2.model.llama import LlamaConfig
from llama2.release import carbon_statement, card_making, card_results
from llama2.release import markdown as md
from llama2.release.licences import LLAMA_2_NOTE, Material, is_from_llama_2
from llama2.release.lineage import Lineage
from llama2.release.measurements import Measured
from llama2.report.energy import Power, format_amounts
from llama2.results import SamplingSettings
from llama2.tokenizer.chat_settings import read_chat_template
from llama2.tokenizer.template import is_llama_2

FILE = "README.md"


class Card(Config):
    """Statements about a model that only a person can make."""

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
class ReleasedModel:
    """All that the papers tell of a model."""

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
        return self.card.title or f"{self.lineage.name} {self.lineage.released.name}".strip()

    @cached_property
    def shape(self) -> LlamaConfig:
        """Its architecture."""
        return read_config(self.lineage.released.step.path)[0]

    @cached_property
    def scorer(self) -> bool:
        """True for a reward model."""
        return read_config(self.lineage.released.step.path)[1]

    @cached_property
    def template(self) -> str | None:
        """Its chat template."""
        return read_chat_template(self.lineage.released.step.path)

    @property
    def chats(self) -> bool:
        """True for a model that was tuned to answer in conversations."""
        return not self.scorer and bool(self.lineage.of("sft", "ppo"))

    @property
    def task(self) -> str:
        """Its task, as the Hub calls it."""
        return "text-classification" if self.scorer else "text-generation"

    @property
    def languages(self) -> tuple[str, ...]:
        """Its languages, as far as they are known."""
        return self.card.language or (("en",) if self.lineage.synthetic else ())

    @property
    def derived(self) -> bool:
        """True for a model that began with Llama 2's weights, as far as names tell."""
        return is_from_llama_2(self.lineage, self.card.base_model)


def document(model: ReleasedModel) -> str:
    """Write README.md."""
    card = model.card
    contact = md.text(card.contact) or "Nobody is named to whom one could write."
    return write_front_matter(model) + md.document(
        f"# {md.text(model.title)}",
        _summary(model),
        md.when(model.derived, LLAMA_2_NOTE),
        _facts(model),
        "## Intended use",
        card.intended_use or _intended(model),
        "## Out of scope",
        card.out_of_scope or _out_of_scope(model),
        _use(model),
        card_making.write_data(model.lineage, model.materials),
        card_making.write_recipe(model.lineage),
        _carbon(model),
        *_results(model),
        _limits(model),
        _notes(card),
        "## Contact",
        contact,
        "## Files",
        _files(model),
    )


def write_front_matter(model: ReleasedModel) -> str:
    """Write the YAML block that the Hub reads."""
    card = model.card
    tags = {
        "conversational": model.chats,
        "reward-model": model.scorer,
        "gguf": bool(model.gguf),
        "synthetic": model.lineage.synthetic,
    }
    fitting = [tag for tag, fits in tags.items() if fits]
    results = [] if model.scorer else card_results.write_index(model.measured, model.task)
    optional = {
        "language": list(model.languages),
        "base_model": card.base_model,
        "datasets": list(card.datasets),
        "model-index": [{"name": model.title, "results": results}] if results else [],
    }
    matter: dict[str, Any] = {
        "license": card.license or ("llama2" if model.derived else "unknown"),
        "library_name": "transformers",
        "pipeline_tag": model.task,
        "tags": sorted({"llama", *card.tags, *fitting}),
        **{name: value for name, value in optional.items() if value},
    }
    text = yaml.safe_dump(matter, sort_keys=True, allow_unicode=True, width=120)
    return f"---\n{text}---\n\n"


def _summary(model: ReleasedModel) -> str:
    kind = "reward" if model.scorer else "chat" if model.chats else "language"
    size = md.count(model.shape.parameters())
    summary = f"A {kind} model of the Llama 2 architecture with {size} parameters"
    story = card_making.tell_story(model.lineage)
    return f"{summary}: {story}." if story else f"{summary}."


def _facts(model: ReleasedModel) -> str:
    shape = model.shape
    days = sorted(filter(None, (stage.step.started[:10] for stage in model.lineage.stages)))
    made = " to ".join(dict.fromkeys(days[:1] + days[-1:]))
    rows = [
        ("Layers", str(shape.num_hidden_layers)),
        ("Width", f"{shape.hidden_size}, {shape.intermediate_size} in the feed-forward network"),
        ("Heads", f"{shape.num_attention_heads}, {shape.num_key_value_heads} of keys and values"),
        *(("Unlike Llama 2", md.text(variation)) for variation in list_variations(shape)),
        ("Vocabulary", md.count(shape.vocab_size)),
        ("Context", f"{md.count(shape.max_position_embeddings)} tokens"),
        ("Weights", model.dtype + md.when(model.converted, ", converted from the run's")),
        ("Languages", ", ".join(map(md.text, model.languages)) or "not stated"),
        ("Licence of the weights", md.text(model.card.license) or "not stated"),
        ("Made", made or "not recorded"),
    ]
    return md.table(("Property", "Value"), rows, (0, 1))


def _intended(model: ReleasedModel) -> str:
    if model.lineage.synthetic:
        return (
            "Study and teaching: it shows what each stage of the Llama 2 recipe does, at a size "
            "that fits a laptop. It can speak about its synthetic world and nothing else."
        )

    return (
        "Research and further training. Whoever released it has not stated a purpose; the results "
        "below say what it was found to do."
    )


def _out_of_scope(model: ReleasedModel) -> str:
    return md.bullets(
        "Anything in which a wrong, harmful or missing answer has consequences.",
        "Advice on health, law or money, and decisions about people.",
        "Use by the public without the checks that `RESPONSIBLE_USE.md` asks for.",
        "Questions about the real world."
        if model.lineage.synthetic
        else "Languages other than those it was measured in.",
    )


# --- how to use it ---
_SAMPLING = SamplingSettings(temperature=0.6, top_p=0.9, max_tokens=256)
_CHAT = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
conversation = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(
    conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, do_sample=True, temperature={temperature}, top_p={top_p}, max_new_tokens={max_tokens})
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={max_tokens})[0], skip_special_tokens=True))"""
_SCORE = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)
conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How can I help?"}]
inputs = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
print(torch.sigmoid(model(**inputs).logits))  # a probability; the logit is the reward"""


def _use(model: ReleasedModel) -> str:
    sampling = model.measured.content.sampling if model.measured else _SAMPLING
    python = _SCORE
    if not model.scorer:
        python = (_CHAT if model.chats else _TEXT).format(**sampling.model_dump())

    commands = []
    if model.scorer:
        commands = ["llama2 serve .    # POST /v1/score"]
    elif model.chats:
        commands = ["llama2 chat .", "llama2 serve .    # OpenAI's interface and a page to chat"]

    return md.document(
        "## How to use it",
        "With transformers (`pip install transformers sentencepiece protobuf`):",
        f"```python\n{python}\n```",
        md.section("With the program that made it:", _shell(*commands)),
        _llama_cpp(model, sampling),
        _format(model),
        md.when(
            model.measured and model.chats, "The settings above are those it was measured with."
        ),
    )


def _shell(*lines: str) -> str:
    return "```sh\n" + "\n".join(lines) + "\n```" if lines else ""


def _llama_cpp(model: ReleasedModel, sampling: SamplingSettings) -> str:
    if not model.gguf:
        return ""

    name, *_ = model.gguf
    how = "-cnv" if model.chats else '-p "Once upon a time" -no-cnv'
    files = [name for name in sorted(model.gguf) if name.endswith(("q8_0.gguf", "q4_0.gguf"))]
    quantized = f"; quantized: {', '.join(map(md.code, files))}" if files else ""
    notes = []
    for file, differences in sorted(model.gguf.items()):
        notes += [f"{md.code(file)}: {md.text(difference)}." for difference in differences]

    return md.document(
        "With llama.cpp:",
        _shell(f"llama-cli -m {name} {how} --temp {sampling.temperature} --top-p {sampling.top_p}"),
        f"The GGUF files are copies{quantized}. The results below are those of the run's weights, "
        "not of a copy.",
        md.bullets(*notes),
    )


def _format(model: ReleasedModel) -> str:
    if not model.chats and not model.scorer:
        return "It was not tuned for conversations: it goes on with a text."

    if not is_llama_2(model.template):
        return md.document(
            "### The format of a conversation",
            "It is what the chat template in `tokenizer_config.json` writes.",
            md.when(
                model.scorer, "A conversation is read up to the token that ends its last answer."
            ),
        )

    return md.document(
        "### The format of a conversation",
        "`<s>` and `</s>` are the tokens that begin and end a turn; all else is text. There may be "
        "no system message.",
        "```\n<s>[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nUSER [/INST] ANSWER </s>"
        "<s>[INST] USER [/INST]\n```",
        "`tokenizer_config.json` has it as a chat template.",
    )


# --- the rest ---
def _carbon(model: ReleasedModel) -> str:
    hours, kwh, kg = carbon_statement.add_up(model.lineage, model.power)
    return md.document(
        "## Energy and carbon",
        f"{carbon_statement.format_duration(hours)} of device time over all stages above, "
        f"about {' and '.join(format_amounts(kwh, kg))} CO2eq by the method of the Llama 2 paper. "
        "`CARBON.md` has the assumptions and every stage.",
    )


def _results(model: ReleasedModel) -> list[str]:
    """Write what was measured; of a reward model, how often it is right."""
    if model.scorer:
        return [md.section("## Evaluation", card_results.write_models(model.lineage))]

    return [
        card_results.write_evaluation(model.lineage, model.measured),
        card_results.write_safety(model.measured),
    ]


def _limits(model: ReleasedModel) -> str:
    measured = model.measured
    families = card_results.sort_families(measured) if measured is not None else []
    weakest = [
        f"It was measured worst on {md.code(name)} prompts ({family.mean:.2f} of 1)."
        for name, family in families[:1]
    ]
    outside = ", ".join(md.code(source.place) for source in model.lineage.bases)
    context = md.count(model.shape.max_position_embeddings)

    return md.document(
        "## Limits",
        md.bullets(
            "It knows nothing beyond its synthetic world, and does not know that."
            if model.lineage.synthetic
            else "It may state what is false, and repeat what is wrong or biased in its data.",
            *weakest,
            md.when(
                model.converted and measured is not None,
                "The weights were converted after they were measured.",
            ),
            f"It reads at most {context} tokens of conversation and answer.",
            "Truthfulness, bias, toxicity, memorised data, attacks over several turns, and "
            "languages were not measured.",
            md.when(outside, f"Nothing is known here about how {outside} came about."),
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


def _files(model: ReleasedModel) -> str:
    return md.bullets(
        "`RESPONSIBLE_USE.md`: where it fails, and what to do before others use it",
        "`CARBON.md`, `carbon.json`",
        "`LICENSES.md`",
        "`COMMANDS.md`, `reproduce.sh`, `configs/`, `lineage.json`: how it was made",
        *(md.code(name) for name in sorted(model.gguf)),
        "`SHA256SUMS`: check with `sha256sum -c SHA256SUMS`",
    )
