"""What cannot work in a recipe: one sentence for everything, before anything is built."""

from collections.abc import Iterator

from dinov3core.bounds import complaints
from dinov3core.data.crops import CropSettings, validate_gram_crops
from dinov3core.data.masks import masked_total
from dinov3core.data.sizes import pair
from dinov3core.models import ConvNeXtSettings, VitSettings
from dinov3core.models.convnext import STAGES
from dinov3core.train.engine.config import (
    FROM_PYTHON,
    LONGEST,
    Earlier,
    Ema,
    File,
    GramAnchor,
    GramTeacher,
    Optim,
    Pretrain,
    Snapshot,
)


def recipe_complaints(recipe: Pretrain, world_size: int) -> Iterator[str]:
    """One sentence for everything that cannot work, each field by itself first."""
    yield from complaints(recipe)
    if recipe.run.total_steps > LONGEST:
        yield (
            f"run.epochs {recipe.run.epochs:g} of run.epoch_steps {recipe.run.epoch_steps}: "
            f"expected at most {LONGEST} steps, got {recipe.run.total_steps}"
        )
    yield from _backbone_complaints(recipe)
    try:
        recipe.crops.validate(recipe.backbone.patch_size)
    except ValueError as error:
        yield str(error)
    yield from _batch_complaints(recipe, recipe.run.batch_size * world_size)
    if recipe.run.from_ and recipe.run.init:
        yield (
            f"run.init {recipe.run.init} and run.from {recipe.run.from_} both say what to start "
            "from; give one of them"
        )
    if recipe.masks.ratio_min > recipe.masks.ratio_max:
        ends = f"{recipe.masks.ratio_min} is above masks.ratio_max {recipe.masks.ratio_max}"
        yield f"masks.ratio_min {ends}; swap them"
    if recipe.gram is not None:
        yield from _gram_complaints(recipe, recipe.gram)
    try:
        validate_gram_crops(recipe.crops, recipe.gram_crops, recipe.backbone.patch_size)
    except ValueError as error:
        yield f"gram.crop_size: {error}"
    yield from _continuing_complaints(recipe)
    yield from _channel_complaints(recipe)
    yield from _best_complaints(recipe)
    yield from _koleo_complaints(recipe, recipe.run.batch_size * world_size)


def _batch_complaints(recipe: Pretrain, world_images: int) -> Iterator[str]:
    for label, head in (("dino", recipe.dino), ("ibot", recipe.ibot)):
        if head.prototypes < max(world_images, 2):
            yield (
                f"{label}.prototypes is {head.prototypes} for {world_images} images a step: "
                "centering gives every prototype an equal share, so different images would "
                f"have to share a target; give at least {max(world_images, 2)} prototypes or a "
                "smaller batch"
            )
    if recipe.run.batch_size % recipe.run.accumulation:
        yield (
            f"run.batch_size {recipe.run.batch_size} must be a multiple of run.accumulation "
            f"{recipe.run.accumulation}"
        )


def _continuing_complaints(recipe: Pretrain) -> Iterator[str]:
    if recipe.optim.freeze_backbone_epochs and not (recipe.run.init or recipe.run.from_):
        yield (
            "optim.freeze_backbone_epochs trains heads on a backbone held still, but run.init "
            "and run.from name no weights it has: give --run.init FILE, in any layout "
            "train/evaluate.py reads"
        )
    if recipe.guard.margin and not recipe.run.eval_every:
        yield (
            f"guard.margin {recipe.guard.margin:g} stops a run whose scores fall, but "
            "run.eval_every is 0, so nothing is measured in mid-run; give steps between "
            "evaluations, or set guard.margin to 0"
        )


def _channel_complaints(recipe: Pretrain) -> Iterator[str]:
    channels = recipe.backbone.in_channels
    if recipe.data.source == "scenes" and channels != 3:
        yield f"the built-in scenes have 3 channels but backbone.in_channels is {channels}"
    if recipe.data.probe == "scenes" and channels != 3:
        yield (
            f"data.probe=scenes shows 3 channels to a backbone of {channels}; "
            "name a folder with train/<class>/ and val/<class>/, or leave it at auto"
        )
    if recipe.data.dense not in ("auto", "none") and channels != 3:
        yield (
            f"data.dense={recipe.data.dense} shows 3 channels to a backbone of {channels}; set "
            "data.dense to none"
        )
    if recipe.crops.mean and len(recipe.crops.mean) != channels:
        yield (
            f"crops.mean has {len(recipe.crops.mean)} channels but backbone.in_channels is "
            f"{channels}; give one mean and std per channel"
        )


def _best_complaints(recipe: Pretrain) -> Iterator[str]:
    data = recipe.data
    on_scenes = data.source in ("scenes", f"{FROM_PYTHON}Scenes")
    measured = on_scenes if data.dense == "auto" else data.dense != "none"
    if recipe.run.keep_best == "dense" and not measured:
        yield (
            "run.keep_best=dense needs a dense score, which this run does not measure; name "
            "images with masks by data.dense, or set run.keep_best to knn"
        )


def _koleo_complaints(recipe: Pretrain, world_images: int) -> Iterator[str]:
    loss = recipe.loss
    images = recipe.run.batch_size
    group = loss.koleo_group_size
    if group and (group % images or world_images % group):
        yield (
            f"loss.koleo_group_size {group} must be a multiple of the {images} images per "
            f"process and divide the {world_images} images of a step"
        )
    if group and not loss.koleo_distributed:
        yield (
            f"loss.koleo_group_size {group} spans processes, but loss.koleo_distributed is "
            "False; set it to True, or the group size to 0"
        )
    among = (group or world_images) if loss.koleo_distributed else images
    if 1 < among <= loss.koleo_topk:
        yield (
            f"loss.koleo_topk {loss.koleo_topk} must be below the {among} images it chooses among"
        )


def _backbone_complaints(recipe: Pretrain) -> Iterator[str]:
    if isinstance(recipe.backbone, ConvNeXtSettings):
        yield from _convnext_complaints(recipe.backbone, recipe.optim)
    else:
        yield from _vit_complaints(recipe.backbone, recipe.crops.local_count)


def _convnext_complaints(backbone: ConvNeXtSettings, optim: Optim) -> Iterator[str]:
    for name in ("depths", "widths"):
        per_stage = getattr(backbone, name)
        if len(per_stage) != STAGES:
            yield (
                f"backbone.{name}: expected a number for each of the {STAGES} stages of a "
                f"ConvNeXt, got {len(per_stage)}"
            )
    if backbone.map_stride is not None:
        yield (
            f"backbone.map_stride {backbone.map_stride} resamples maps of a model in use, which "
            "no term of the objective reads and no file of weights states; leave it at None"
        )
    if (optim.layer_decay, optim.patch_embed_lr) != (1, 1):
        yield (
            f"optim.layer_decay {optim.layer_decay:g} and optim.patch_embed_lr "
            f"{optim.patch_embed_lr:g} are for blocks and patch embedding of a ViT, and a ConvNeXt "
            "has one rate for all; give --optim.layer-decay 1 --optim.patch-embed-lr 1"
        )


def _vit_complaints(backbone: VitSettings, local_crops: int) -> Iterator[str]:
    if backbone.width % (4 * backbone.heads):
        yield (
            f"backbone.width {backbone.width} must be a multiple of 4 * backbone.heads = "
            f"{4 * backbone.heads}: RoPE turns pairs of channels for two axes"
        )
    if backbone.width * backbone.ffn_ratio < 1:
        yield (
            f"backbone.ffn_ratio {backbone.ffn_ratio} of a width of {backbone.width} leaves no "
            f"channel; give at least {1 / backbone.width:g}"
        )
    if backbone.untie_local_cls_norm and not local_crops:
        yield ("backbone.untie_local_cls_norm is a norm of local crops, but crops.local_count is 0")
    rope = backbone.rope
    periods = (rope.min_period, rope.max_period)
    if not rope.base and not all(periods):
        yield (
            "backbone.rope.base: expected at least 0.01, or 0 beside both min_period and "
            f"max_period, got {rope.base} beside {rope.min_period} and {rope.max_period}"
        )
    if rope.base and any(periods):
        yield (
            "backbone.rope.min_period, max_period: expected 0 beside a base of "
            f"{rope.base}, got {rope.min_period} and {rope.max_period}; set "
            "backbone.rope.base to 0"
        )


def _gram_complaints(recipe: Pretrain, gram: GramAnchor) -> Iterator[str]:
    yield from _gram_teacher_complaints(recipe, gram.teacher)
    if gram.crops is not None:
        yield from _gram_crop_complaints(recipe, gram)
    elif (gram.distorted, gram.resize, gram.antialias) != (False, "bicubic", False):
        yield (
            "gram.distorted, gram.resize and gram.antialias say how a Gram teacher sees crops "
            "of its own; give gram.crop_size as well, or leave them out"
        )
    if gram.tokens != "all" and gram.per_image:
        yield (
            f"gram.tokens {gram.tokens} is another count of patches in every crop; set "
            "gram.per_image to False"
        )
    if not _compared_patches(recipe, gram.tokens):
        yield (
            f"gram.tokens {gram.tokens} leaves no patch to compare with masks.probability "
            f"{recipe.masks.probability:g} and masks.ratio_max {recipe.masks.ratio_max:g}"
        )
    if not gram.per_image and recipe.run.accumulation > 1:
        yield (
            "gram.per_image False is one Gram matrix over the batch, which run.accumulation "
            "would cut; use gram.per_image True or run.accumulation 1"
        )


def _gram_teacher_complaints(recipe: Pretrain, teacher: GramTeacher) -> Iterator[str]:
    if isinstance(teacher, Ema):
        return
    if isinstance(teacher, File) and not teacher.path:
        yield (
            "gram.teacher.path: expected a file of weights, the folder of a run or of a "
            "checkpoint, got none"
        )
    if isinstance(teacher, Earlier) and recipe.earlier is None:
        yield (
            "gram.teacher earlier is a teacher of the run this stage starts from, and there is "
            "none; give --run.from RUN, or another gram.teacher: snapshot, file or ema"
        )
    if isinstance(teacher, Snapshot):
        first = recipe.run.stretched(teacher.first)
        if first >= recipe.run.total_steps:
            yield (
                f"gram.teacher.first: the first snapshot is due before step {first}, and the "
                f"run ends after {recipe.run.total_steps} steps; take it earlier"
            )
    if teacher.at_most and not teacher.every:
        yield (
            f"gram.teacher.at_most {teacher.at_most} limits how often the EMA teacher is "
            "copied again, which gram.teacher.every 0 never does; give gram.teacher.every"
        )


def _gram_crop_complaints(recipe: Pretrain, gram: GramAnchor) -> Iterator[str]:
    if isinstance(gram.teacher, Ema):
        yield (
            f"gram.crop_size {gram.crop_size}: the EMA teacher sees the global views alone; "
            "give a gram.teacher that has crops of its own (snapshot, file), or leave "
            "gram.crop_size out"
        )


def _compared_patches(recipe: Pretrain, tokens: str) -> int:
    """The fewest patches of a process's batch that the Gram term compares at any step."""
    crops = recipe.crops.global_count * recipe.run.batch_size
    sizes = recipe.crops.of_each_size
    fewest = crops * min(_patches_of(recipe, of_size) for of_size in sizes)
    masked = masked_total(crops, fewest // crops, recipe.masks)
    return {"all": fewest, "masked": masked}.get(tokens, fewest - masked)


def _patches_of(recipe: Pretrain, crops: CropSettings) -> int:
    """Of a global crop."""
    height, width = pair(crops.global_size)
    return (height // recipe.backbone.patch_size) * (width // recipe.backbone.patch_size)
