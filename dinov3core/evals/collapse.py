"""Does a run still learn? Rank, entropies and usage of prototypes, and a verdict in words.

Two collapses of self-distillation are known (Caron et al. 2021, "Emerging Properties in
Self-Supervised Vision Transformers", section 5.3). Uniform: the targets spread evenly over all K
prototypes, their entropy is ln K and nothing is left to learn. Dimensional: the features fall onto
few directions, in the extreme onto one point or one prototype. Entropies are in nats.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.evals.differences import Measured, errors_between, fell

# Targets within 3 % of ln K count as uniform. Short runs on procedural scenes: healthy ones sat at
# 0.65 to 0.80 of ln K, those that never left the uniform point at 0.97 to 1.00.
UNIFORM_ENTROPY = 0.97
# A rank below 2 % of the width (at least 2) counts as collapsed. Healthy small networks measured
# 0.5 (untrained) to 0.65 (trained) of the width; a network that merely tells ten classes apart
# keeps a rank of about ten.
COLLAPSED_RANK = 0.02
# Below this share of their squared length, unit-norm features are one point: about the rounding of
# bf16 features.
COLLAPSED_SPREAD = 1e-5
# A loss below 2 % of ln K on ever fewer prototypes: uncentred targets took it to 0.0005 of ln K on
# 4 of 64 prototypes, with a rank of 9 of 32 that alone looks harmless. Healthy runs stay above 0.25
# of ln K.
EMPTY_LOSS = 0.02
# A rank that grew by a tenth since the first evaluation is leaving the point where small LayerScale
# lets it start.
GROWTH = 1.1
# Health needs evidence, so between it and collapse lies a band in which nothing is said: targets
# below 95 % of ln K (the highest healthy run above had 80 %), twice the rank of collapse.
CLEAR_ENTROPY = 0.95
CLEAR_RANK = 2 * COLLAPSED_RANK
PATIENCE = 100  # steps before which no run is judged: runs start near one of the two collapses


Rows = Sequence[Mapping[str, object]]  # of a log


class Verdict(NamedTuple):
    """What became of a run: its kind, a badge of a few words, and the numbers behind it.

    "none" is given on evidence of health alone, "unknown" when it is too early or the evidence is
    mixed, "not_judged" when the log lacks what a verdict needs.
    """

    kind: Literal["none", "uniform", "dimensional", "unknown", "not_judged"]
    title: str
    reason: str

    @property
    def sentence(self) -> str:
        return f"{self.title}: {self.reason}."


class Usage(NamedTuple):
    """How many of K prototypes are in use."""

    fraction: float  # of those assigned at least once
    perplexity: float  # exp(entropy) of the shares of assignments, 1 to K


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """The effective rank of features [N, D], 1 to min(N, D): exp(entropy of singular values).

    Garrido et al. 2023, "RankMe", equation 1. Features that are all zero have rank 0.
    """
    _check_finite(features, "features")
    x = features.double()
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values.sum() == 0:
        return 0.0
    p = values / values.sum() + eps
    return torch.exp(-(p * p.log()).sum()).item()


def feature_spread(features: Tensor) -> float:
    """How far features [N, D] are from one point (0) to 1: 1 - |mean of the unit-norm rows|^2."""
    _check_finite(features, "features")
    unit = F.normalize(features.double(), dim=1)
    return (unit - unit.mean(0)).square().sum(1).mean().item()


def mean_entropy(probabilities: Tensor) -> float:
    """Mean entropy of the rows of [R, K] probabilities, in nats; K equal entries give ln K."""
    return torch.special.entr(probabilities.float()).sum(-1).mean().item()


def logits_entropy(logits: Tensor, temperature: float = 1.0) -> float:
    """Mean entropy of softmax(logits / temperature) over the rows of [R, K], in nats."""
    return torch.cat([_row_entropy(rows, temperature) for rows in logits.split(64)]).mean().item()


def prototype_usage(assignments: Tensor, prototypes: int) -> Usage:
    """Usage of `prototypes` prototypes by assignments of any shape: the argmax of each target."""
    counts = torch.bincount(assignments.flatten(), minlength=prototypes)
    if len(counts) > prototypes or not len(assignments.flatten()):
        raise ValueError(
            f"assignments: expected integers from 0 to {prototypes - 1} and at least one of them, "
            f"got {assignments.numel()} with the largest {len(counts) - 1}"
        )
    shares = counts.double() / counts.sum()
    return Usage((counts > 0).double().mean().item(), torch.special.entr(shares).sum().exp().item())


def patch_similarity_drift(now: Tensor, reference: Tensor) -> float:
    """How far similarities of patches have moved: mean absolute difference of cosines, 0 to 2.

    Dense features of long runs decay while image-level scores still rise (Simeoni et al. 2025,
    "DINOv3", section 4); this is the quantity Gram anchoring holds on to.

    Args:
        now, reference: features of the same images by two model states, maps [B, D, h, w] or tokens
            [B, P, D]; the widths may differ.
    """
    now = _tokens(now)
    reference = _tokens(reference)
    if now.shape[:2] != reference.shape[:2]:
        raise ValueError(
            f"patches: expected the same images and patches twice, got {list(now.shape[:2])} and "
            f"{list(reference.shape[:2])}; extract both at one image size"
        )
    per_image = [(_cosines(a) - _cosines(b)).abs().mean() for a, b in zip(now, reference)]
    return torch.stack(per_image).mean().item()


def collapse_verdict(rows: Rows, *, width: int, patience: int = PATIENCE) -> Verdict:
    """Judge a run by its log: is it healthy, has it collapsed, and how?

    A run also starts near ln K (the prototypes are random) and, with a small LayerScale, near rank
    1. So nothing is judged before step `patience`, uniform means that the targets stayed there
    throughout the last quarter of the run, and dimensional means that the rank is not growing.
    Healthy is what shows targets clear of ln K, a rank clear of collapse, and a k-NN accuracy,
    where there is one, no more than its standard error below the first one.

    Args:
        rows: the run's log in order. Read where present: `step`, `log_k`, `target_entropy`,
            `dino_global`, `dino_local` of training rows; `rankme`, `feature_spread`,
            `prototype_usage` (a share), `knn` and `knn_error` (percent) of evaluation rows.
        width: the largest rank possible: the backbone's width, or the number of images where they
            are fewer.
        patience: first step at which to judge; give twice the warm-up's length where it is longer.
    """
    last = max((int(row["step"]) for row in rows if _finite(row.get("step"))), default=0)
    if last < patience:
        reason = f"the log ends at step {last}, and runs are judged from step {patience} on"
        return Verdict("unknown", "Too early to tell", reason)
    late = [row for row in rows if int(row.get("step") or 0) >= patience]
    recent = [row for row in late if int(row["step"]) >= 3 * last // 4]
    return (
        _uniform(recent)
        or _dimensional(rows, late, recent, width)
        or _blind(recent, late)
        or _undecided(recent, late, width)
        or _worse(rows, late)
        or _healthy(recent, rows, width)
    )


def _uniform(recent: Rows) -> Verdict | None:
    """Targets at ln K in every recent row, and the loss, never below their entropy, as well."""
    shares = _entropy_shares(recent)
    if not shares or min(shares) < UNIFORM_ENTROPY:
        return None
    log_k = _series(recent, "log_k")[-1]
    losses = _series(recent, "dino_global") or _series(recent, "dino_local")
    loss = f", student loss {losses[-1]:.2f}" if losses else ""
    return Verdict(
        "uniform",
        "Uniform collapse",
        f"the targets spread over all prototypes (entropy {shares[-1]:.1%} of ln K = {log_k:.2f}"
        f"{loss}) and teach nothing; lower the teacher temperature, or start from a wider head"
        " initialisation",
    )


def _dimensional(rows: Rows, late: Rows, recent: Rows, width: int) -> Verdict | None:
    """The latest look against the first one, which may lie before any judgement."""
    keys = ("rankme", "feature_spread", "prototype_usage")
    ranks, spreads, usage = (_series(late, key) for key in keys)
    first_rank, first_spread, first_usage = ((_series(rows, key) or [math.inf])[0] for key in keys)
    fewer = not usage or usage[-1] <= first_usage / 2
    log_k = (_series(rows, "log_k") or [math.inf])[-1]
    losses = _series(recent, "dino_global") or _series(recent, "dino_local")
    reason = ""
    if ranks and ranks[-1] < max(2.0, COLLAPSED_RANK * width) and ranks[-1] < GROWTH * first_rank:
        reason = f"RankMe is {ranks[-1]:.1f} of {width}"
    elif spreads and spreads[-1] < COLLAPSED_SPREAD and spreads[-1] <= first_spread:
        reason = f"all features point one way (spread {spreads[-1]:.1e})"
    elif usage and usage[-1] * math.exp(log_k) < 1.5:
        reason = f"every target names the same one of {math.exp(log_k):.0f} prototypes"
    elif losses and max(losses) < EMPTY_LOSS * log_k < math.inf and fewer:
        reason = f"the targets became trivial (student loss {losses[-1]:.3f}, ln K = {log_k:.2f})"
    if not reason:
        return None
    return Verdict(
        "dimensional",
        "Dimensional collapse",
        f"{reason}; check that the targets are centred, and raise the KoLeo weight or lower "
        "optim.lr",
    )


def _blind(recent: Rows, late: Rows) -> Verdict | None:
    """Without entropy or rank one of the two collapses could hide."""
    series = (("target entropy", _entropy_shares(recent)), ("RankMe", _series(late, "rankme")))
    missing = [name for name, values in series if not values]
    if not missing:
        return None
    reason = f"the log holds no {' and no '.join(missing)} to judge by"
    return Verdict("not_judged", "Not judged", reason)


def _undecided(recent: Rows, late: Rows, width: int) -> Verdict | None:
    """Neither collapsed nor clear of it."""
    shares = _entropy_shares(recent)
    share = sum(shares) / len(shares)
    rank = _series(late, "rankme")[-1]
    clear_rank = max(4.0, CLEAR_RANK * width)
    losses = _series(recent, "dino_global")
    log_k = _series(recent, "log_k")[-1]
    doubts = []
    if share >= CLEAR_ENTROPY:
        healthy = f"healthy runs stay below {CLEAR_ENTROPY:.0%}"
        doubts.append(f"the targets' entropy is {share:.1%} of ln K, where {healthy}")
    if rank < clear_rank:
        healthy = f"healthy runs have {clear_rank:.1f} or more"
        doubts.append(f"RankMe is {rank:.1f} of {width}, where {healthy}")
    if losses and max(losses) < EMPTY_LOSS * log_k:
        share = f"{losses[-1]:.3f} of ln K = {log_k:.2f}"
        doubts.append(f"the student's loss is {share} and leaves nothing to learn")
    return Verdict("unknown", "Undecided", "; ".join(doubts)) if doubts else None


def _worse(rows: Rows, late: Rows) -> Verdict | None:
    """k-NN below the first evaluation by more than chance."""
    before = _accuracies(rows)[:1]
    after = _accuracies(late)[-1:]
    if not after or not fell(before[0], after[0]):
        return None
    count = errors_between(before[0], after[0])
    by = f" ({count:.1f} standard errors)" if math.isfinite(count) else ""
    return Verdict(
        "unknown",
        "k-NN below its start",
        f"{after[0].value:.1f} % after training, {before[0].value:.1f} % before{by}: these features"
        " tell the classes apart less well than those the run began with; neither targets nor rank"
        " collapsed",
    )


def _healthy(recent: Rows, rows: Rows, width: int) -> Verdict:
    entropy = _series(recent, "target_entropy")[-1]
    log_k = _series(recent, "log_k")[-1]
    rank = _series(rows, "rankme")[-1]
    scores = _series(rows, "knn")
    facts = [f"target entropy {entropy:.2f} of ln K = {log_k:.2f}", f"RankMe {rank:.1f} of {width}"]
    if len(scores) > 1:
        facts.append(f"k-NN {scores[0]:.1f} to {scores[-1]:.1f} %")
    return Verdict("none", "Healthy run", f"no sign of collapse, {', '.join(facts)}")


def _entropy_shares(rows: Rows) -> list[float]:
    """The targets' entropy in shares of ln K."""
    pairs = ((row.get("target_entropy"), row.get("log_k")) for row in rows)
    return [entropy / log_k for entropy, log_k in pairs if _finite(entropy) and _finite(log_k)]


def _accuracies(rows: Rows) -> list[Measured]:
    """k-NN with its standard errors, where it is finite."""
    measured = [row for row in rows if _finite(row.get("knn"))]
    errors = [row.get("knn_error") for row in measured]
    known = [float(error) if _finite(error) else None for error in errors]
    return [Measured(*score) for score in zip(_series(measured, "knn"), known)]


def _series(rows: Rows, key: str) -> list[float]:
    """The finite values under `key`, in order."""
    return [float(row[key]) for row in rows if _finite(row.get(key))]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _row_entropy(logits: Tensor, temperature: float) -> Tensor:
    return torch.special.entr(torch.softmax(logits.float() / temperature, dim=-1)).sum(-1)


def _tokens(patches: Tensor) -> Tensor:
    return patches.flatten(2).mT if patches.ndim == 4 else patches


def _cosines(patches_PD: Tensor) -> Tensor:
    unit = F.normalize(patches_PD.float(), dim=1)
    return unit @ unit.T


def _check_finite(features: Tensor, name: str) -> None:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{name}: expected [N, D] with N >= 1, got {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(
            f"{name}: expected finite values, got NaN or infinity; the model that made them has "
            "diverged"
        )
