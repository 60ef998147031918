"""What is learnt: one pure function for each loss of the paper, from (model, batch) to summed loss
and metrics.

Shapes: B rows, T positions, P pairs (the first P rows of a batch are the chosen answers, the last P
the rejected ones). A position is a prediction: `targets_BT[b, t]` is the token after `tokens_BT[b,
t]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.batches import Batch
from llama2.records import DEGREES
from llama2.train.loop import Loss, Objective

Margins = Literal["none", "small", "large"]
MARGINS: dict[Margins, tuple[float, ...]] = {  # in the order of DEGREES (Table 27)
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (1.0, 2 / 3, 1 / 3, 0.0),
    "large": (3.0, 2.0, 1.0, 0.0),
}


def select_packing(batch: Batch) -> dict[str, Tensor]:
    """Return the batch's document and position ids, where rows hold several documents."""
    return {name: batch[name] for name in ("documents_BT", "positions_BT") if name in batch}


def next_token(model: nn.Module, batch: Batch) -> Loss:
    """Cross-entropy of the next token, in nats: pretraining (§2) and, with the weights of answers
    only, SFT (§3.1).

    Batch: tokens_BT, targets_BT, weights_BT (0 where a target carries no loss) and, for packed
    rows, documents_BT and positions_BT. The weight is the sum of weights_BT.
    """
    logp_BT = model(batch["tokens_BT"], targets_BT=batch["targets_BT"], **select_packing(batch))
    weights_BT = batch["weights_BT"].to(logp_BT.dtype)
    return Loss(-(logp_BT * weights_BT).sum(), weights_BT.sum())


def make_ranking_loss(margins: Margins = "small", auxiliary_weight: float = 0.0) -> Objective:
    """The reward model's loss (§3.2.2, equation 2): -log sigmoid(r_chosen - r_rejected -
    m(degree)), per pair.

    The safety model adds an auxiliary loss that separates safe from unsafe answers (Table 29). The
    paper does not give its form: here it is the binary cross-entropy of sigmoid(r) against "is
    safe", over the answers that have a label, each counting half of a pair, times
    `auxiliary_weight`.

    Batch: tokens_BT and lengths_B, the chosen rows first, or a row a pair whose answers share a
    prompt: tokens_BT, branches_BT and ends_BK, the chosen answer first; degrees_P, indices into
    DEGREES; safe_B, the chosen answers first, with 1 safe, 0 unsafe, -1 no label (may be absent
    where `auxiliary_weight` is 0); weights_P, 0 for a pair that does not count (absent: all count).
    """
    table = torch.tensor(MARGINS[margins])

    def objective(model: nn.Module, batch: Batch) -> Loss:
        score_B = score_answers(model, batch)
        chosen_P, rejected_P = score_B.chunk(2)
        degrees_P = batch["degrees_P"]
        weights_P = (
            batch["weights_P"].float() if "weights_P" in batch else torch.ones_like(chosen_P)
        )
        margin_P = table.to(score_B.device)[degrees_P]
        total = -(F.logsigmoid(chosen_P - rejected_P - margin_P) * weights_P).sum()
        metrics = _ranking_metrics(chosen_P.detach(), rejected_P.detach(), degrees_P, weights_P)
        metrics |= {"reward/ranking_loss": total.detach()}

        if auxiliary_weight:
            auxiliary, measured = _separation(score_B, batch["safe_B"], weights_P.repeat(2))
            total = total + auxiliary_weight * auxiliary
            metrics |= measured

        return Loss(total, weights_P.sum(), metrics)

    return objective


def score_answers(model: nn.Module, batch: Batch) -> Tensor:
    """Return the scores of the chosen answers and behind them those of the rejected ones, [2 P], in
    fp32."""
    if "branches_BT" not in batch:
        score_B: Tensor = model(batch["tokens_BT"], lengths_B=batch["lengths_B"])
        return score_B.float()

    score_P2: Tensor = model(
        batch["tokens_BT"], branches_BT=batch["branches_BT"], ends_BK=batch["ends_BK"]
    )
    return score_P2.float().t().flatten()


def _separation(
    score_B: Tensor, safe_B: Tensor, weights_B: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The auxiliary safety loss, each answer half of a pair, and its metrics per labelled
    answer."""
    labelled_B = (safe_B >= 0) * weights_B
    loss_B = F.binary_cross_entropy_with_logits(
        score_B, safe_B.clamp(min=0).float(), reduction="none"
    )
    loss, count = (loss_B * labelled_B).sum(), labelled_B.sum()
    right_B = (score_B.detach() > 0) == (safe_B == 1)

    return loss / 2, {
        "reward/safety_loss": loss.detach(),
        "reward/safety_loss/weight": count,
        "reward/safety_accuracy": (right_B * labelled_B).sum(),
        "reward/safety_accuracy/weight": count,
    }


def _ranking_metrics(
    chosen_P: Tensor, rejected_P: Tensor, degrees_P: Tensor, weights_P: Tensor
) -> dict[str, Tensor]:
    """Accuracy overall and by degree (Table 8; a tie counts half) and mean raw scores."""
    right_P = ((chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)) * weights_P
    metrics = {
        "reward/accuracy": right_P.sum(),
        "reward/difference": ((chosen_P - rejected_P) * weights_P).sum(),
        "reward/chosen": (chosen_P * weights_P).sum(),
        "reward/rejected": (rejected_P * weights_P).sum(),
    }
    for index, degree in enumerate(DEGREES):
        here_P = degrees_P == index
        metrics[f"reward/accuracy/{degree}"] = (right_P * here_P).sum()
        metrics[f"reward/accuracy/{degree}/weight"] = (weights_P * here_P).sum()

    return metrics


def make_ppo_loss(
    clip: float = 0.2, value_clip: float = 0.2, value_coefficient: float = 0.5
) -> Objective:
    """PPO's clipped surrogate with a clipped value loss (§3.2.3; Schulman et al. 2017, equations 7
    and 9).

    Per response token: -min(rho A, clip(rho, 1 - clip, 1 + clip) A) with rho = exp(logp -
    old_logp), plus `value_coefficient` times max((v - R)^2, (v_clipped - R)^2) / 2, where v_clipped
    stays within `value_clip` of the value at sampling time. The KL penalty of equation 4 is part of
    the reward, not of this loss.

    The model maps (tokens_BT, targets_BT=) to (logp_BT, entropy_BT, values_BT). Batch: tokens_BT,
    targets_BT, weights_BT (1 on response tokens), and old_logp_BT, advantages_BT, returns_BT,
    old_values_BT.
    """

    def objective(model: nn.Module, batch: Batch) -> Loss:
        logp_BT, entropy_BT, values_BT = model(
            batch["tokens_BT"], targets_BT=batch["targets_BT"], **select_packing(batch)
        )
        mask_BT = batch["weights_BT"].float()
        log_ratio_BT = (logp_BT - batch["old_logp_BT"]) * mask_BT
        ratio_BT = log_ratio_BT.exp()
        advantages_BT, returns_BT, old_BT = (
            batch["advantages_BT"],
            batch["returns_BT"],
            batch["old_values_BT"],
        )
        surrogate_BT = torch.minimum(
            ratio_BT * advantages_BT, ratio_BT.clamp(1 - clip, 1 + clip) * advantages_BT
        )
        near_BT = old_BT + (values_BT - old_BT).clamp(-value_clip, value_clip)
        squares_BT = 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2)
        policy, value = -(surrogate_BT * mask_BT).sum(), (squares_BT * mask_BT).sum()

        with torch.no_grad():
            error_BT = (returns_BT - values_BT) * mask_BT
            metrics = {
                "ppo/policy_loss": policy.detach(),
                "ppo/value_loss": value.detach(),
                "ppo/entropy": (entropy_BT * mask_BT).sum(),
                # KL(old || new) by k3 = rho - 1 - log rho: unbiased under old samples and never
                # negative
                "ppo/kl": (torch.expm1(log_ratio_BT) - log_ratio_BT).sum(),
                "ppo/clip_fraction": (((ratio_BT - 1).abs() > clip) * mask_BT).sum(),
                "ppo/ratio_deviation": (ratio_BT - 1).abs().sum(),
                "ppo/return": (returns_BT * mask_BT).sum(),
                "ppo/return_square": (returns_BT**2 * mask_BT).sum(),
                "ppo/error": error_BT.sum(),
                "ppo/error_square": (error_BT**2).sum(),
            }

        return Loss(policy + value_coefficient * value, mask_BT.sum(), metrics)

    return objective


def compute_explained_variance(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return 1 - Var(return - value) / Var(return), from the means which `make_ppo_loss` reports;
    {} where returns do not vary."""
    if "ppo/return" not in metrics:
        return {}

    variance = metrics["ppo/return_square"] - metrics["ppo/return"] ** 2
    error = metrics["ppo/error_square"] - metrics["ppo/error"] ** 2
    return {"ppo/explained_variance": 1 - error / variance} if variance > 1e-12 else {}
