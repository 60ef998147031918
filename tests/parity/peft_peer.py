"""Runs under an interpreter that has peft: makes adapters of a model as its users do, and says what
it computes.

Arguments: the base, a directory for the adapters, and a JSON object of name -> [rows of the
vocabulary or null, settings of LoraConfig]. Each adapter gets its logits on ids 3 to 39 as
logits.pt beside it.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model


def make(base: str, out: Path, rows: int | None, settings: dict) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)

    adapted = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
    ).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)

    adapted.save_pretrained(out)
    with torch.no_grad():
        torch.save(adapted(torch.arange(3, 40)[None]).logits, out / "logits.pt")


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    base, out, cases = sys.argv[1:]

    for name, (rows, settings) in json.loads(cases).items():
        make(base, Path(out) / name, rows, settings)


main()
