"""Runs under an interpreter that has transformers: opens a model directory and answers one JSON
value a line.

{"directory": path} loads model and tokenizer; then {"greedy": ids, "count": n} gives the ids that
follow, and {"tokenize": text} the ids of a text.
"""

import json
import sys

import torch
import transformers


def answer(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    asked: dict,
) -> list:
    if "tokenize" in asked:
        return tokenizer.encode(asked["tokenize"], add_special_tokens=False)

    ids = torch.tensor([asked["greedy"]])
    model.generation_config.eos_token_id = None  # all of the tokens asked for, whatever they are
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked["count"],
            do_sample=False,
            pad_token_id=0,
        )

    return out[0, ids.shape[1] :].tolist()


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    directory = json.loads(sys.stdin.readline())["directory"]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    print(json.dumps(transformers.__version__), flush=True)

    for line in sys.stdin:
        print(json.dumps(answer(model, tokenizer, json.loads(line))), flush=True)


main()
