"""The peers as sides of a comparison: started by train.py and ppo.py, with an interpreter that has
them.

    python benchmarks/peers.py train transformers|litgpt SIZE fp32|bf16 [--compile]
    python benchmarks/peers.py ppo SIZE

Each is taken in its own best form: AdamW fused into one kernel, the loss it ships with, large
blocks on the heap. Of this project only the sizes and the allocator setting are imported, so that
the interpreter needs but PyTorch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import SIZES, Questions, Size, serve
from torch import Tensor

from llama2 import cpu_tuning

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, EPOCHS = 32, 64, 64, 4
# rows of a micro-batch, on both sides; TRL takes 4.83 s with 8, 4.55 s with 16, 4.64 s with 32
MICRO = 32


def hugging_config(size: Size, **extra: Any) -> Any:
    """transformers' configuration of the same model; without an end token every answer has its full
    length."""
    import transformers

    values = {**vars(size.config), "eos_token_id": None, "pad_token_id": 0}
    return transformers.LlamaConfig(**values, attn_implementation="sdpa", **extra)


# --- training ---
def hugging(
    size: Size, compile: bool
) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """transformers' model with the loss it computes from labels, which it shifts itself."""
    import transformers

    model = transformers.LlamaForCausalLM(hugging_config(size))
    run: Any = torch.compile(model) if compile else model

    return model, lambda inputs, targets: run(input_ids=inputs, labels=inputs).loss


def litgpt(size: Size, compile: bool) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """litgpt's model with the chunked cross-entropy of its own training scripts."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = size.config
    model = GPT(
        Config(
            block_size=size.length,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_query_groups=shape.num_key_value_heads,
            n_embd=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_eps=shape.rms_norm_eps,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )

    if shape.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight

    run: Any = torch.compile(model) if compile else model
    return model, lambda inputs, targets: chunked_cross_entropy(run(inputs), targets)


def train(name: str, size: Size, precision: str, compile: bool) -> None:
    """Steps of forward, loss, backward, clipping and AdamW on random tokens."""
    model, loss_of = {"transformers": hugging, "litgpt": litgpt}[name](size, compile)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        begin = time.perf_counter()
        tokens = torch.randint(3, size.config.vocab_size, (size.rows, size.length + 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

        return time.perf_counter() - begin

    def work(seconds: float) -> dict[str, Any]:
        end, steps = time.perf_counter() + seconds, [step()]
        while time.perf_counter() < end:
            steps.append(step())

        return {"seconds": steps}

    serve(work)


# --- PPO ---
def word_tokenizer(vocabulary: int) -> Any:
    """A word for each id: the trainer asks for a tokenizer, its data are ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"w{token}": token for token in range(3, vocabulary)},
    }

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def ppo(size: Size) -> None:
    """TRL's PPOTrainer, one iteration a question. It runs in one long `train`, so it is held
    between iterations."""
    import datasets
    import transformers
    import trl.experimental.ppo.ppo_trainer as module
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    questions = Questions()
    asked, marks = iter(questions), dict[str, float]()
    generate, forward = module.batch_generation, module.forward

    def marked_generate(*arguments: Any, **named: Any) -> Any:
        result = generate(*arguments, **named)
        marks["rolled"] = time.perf_counter()
        return result

    def marked_forward(model: Any, *arguments: Any, **named: Any) -> Any:
        # policy and value pass together in the update alone
        if isinstance(model, module.PolicyAndValueWrapper):
            marks.setdefault("scored", time.perf_counter())

        return forward(model, *arguments, **named)

    class Hold(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            end = time.perf_counter()
            questions.answer(
                rollout=marks["rolled"] - marks["begin"],
                scoring=marks["scored"] - marks["rolled"],
                update=end - marks["scored"],
                total=end - marks["begin"],
            )
            wait()

    def wait() -> None:
        if next(asked, None) is None:
            raise SystemExit  # the trainer has no gentler way to be stopped

        marks.clear()
        marks["begin"] = time.perf_counter()

    module.batch_generation, module.forward = marked_generate, marked_forward
    data = datasets.Dataset.from_dict(
        {
            "input_ids": torch.randint(
                3, size.config.vocab_size, (4 * PROMPTS, PROMPT_TOKENS)
            ).tolist()
        }
    )
    scorers = [
        transformers.LlamaForSequenceClassification(hugging_config(size, num_labels=1))
        for _ in range(2)
    ]
    policies = [transformers.LlamaForCausalLM(hugging_config(size)) for _ in range(2)]

    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            logging_steps=10**6,
            learning_rate=1e-6,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=PROMPTS // MICRO,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            temperature=1.0,
            total_episodes=PROMPTS * 10**4,
            response_length=NEW_TOKENS,
            local_rollout_forward_batch_size=PROMPTS,
            num_sample_generations=0,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=word_tokenizer(size.config.vocab_size),
            model=policies[0],
            ref_model=policies[1],
            reward_model=scorers[0],
            value_model=scorers[1],
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Hold()],
        )
        wait()
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    training = tasks.add_parser("train")
    training.add_argument("name", choices=("transformers", "litgpt"))
    training.add_argument("size", choices=SIZES)
    training.add_argument("precision", choices=("fp32", "bf16"))
    training.add_argument("--compile", action="store_true")
    tasks.add_parser("ppo").add_argument("size", choices=SIZES)
    arguments = parser.parse_args()
    cpu_tuning.keep_large_blocks()
    torch.manual_seed(0)
    size = SIZES[arguments.size]

    if arguments.task == "train":
        train(arguments.name, size, arguments.precision, arguments.compile)
    else:
        ppo(size)


if __name__ == "__main__":
    main()
